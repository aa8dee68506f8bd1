"""Documents from anything an owner has: JSONL, Parquet, text files, a folder of them, TFDS.

Also which documents are held out, which is a property of the text alone: every command that is
told the same held-out share leaves out the same documents, in whatever order they come.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow.parquet

from flexolmo_jax.data.groups import BadGroup, group_id

TEXT_SUFFIXES = (".txt", ".md", ".text")
SUFFIXES = (".jsonl", ".parquet", *TEXT_SUFFIXES)
CORPUS = Path(__file__).parent.parent / "corpus"


class Document(NamedTuple):
    text: str
    group: str  # documents of one group (a book, a patient) are held out together
    where: str = ""  # file:row


@dataclasses.dataclass
class Report:
    """What reading a source met: counts, and where the rows that could not be used are."""

    documents: int = 0
    duplicates: int = 0
    bad_rows: list[str] = dataclasses.field(default_factory=list)  # "file:line: why"

    def lines(self, most: int = 5) -> list[str]:
        """What to tell the user; empty if all went well."""
        out = [f"skipped {row}" for row in self.bad_rows[:most]]
        if len(self.bad_rows) > most:
            out.append(f"... {len(self.bad_rows)} bad rows were skipped in all")
        return out

    def tell(self) -> None:
        """Prints `lines` on standard error: standard output may be JSON."""
        for line in self.lines():
            print(line, file=sys.stderr)


def read_documents(
    source: str | Path,
    *,
    text_field: str = "text",
    group_field: str = "group",
    report: Report | None = None,
    distinct: Literal["text", "group"] = "text",
) -> Iterator[Document]:
    """Reads every usable, distinct document of a source.

    Args:
      source: a .jsonl, .parquet or text file, a folder of such files (searched in depth, in the
        order of their names), "corpus:NAME" of the texts that come with flexolmo_jax, or
        "tfds:NAME[/CONFIG]" of a dataset that is already prepared; with "[SPLIT]" behind it, in
        brackets, of one split only.
      text_field: the field of a row that holds the text.
      group_field: the field of a row that names its group; rows without it stand alone.
      report: is filled with counts and bad rows (unreadable, no text, empty).
      distinct: a text that comes again is left out; with "group", only in the same group: what is
        read of a group then depends on nothing outside of it.

    Raises:
      ValueError: the source is missing, of an unknown kind, or holds no usable document; with
        distinct="group", a row has something in its group field that is no id.
    """
    report = Report() if report is None else report
    if str(source).startswith("tfds:"):
        rows = _tfds_rows(str(source), text_field, group_field)
    else:
        rows = _file_rows(source, text_field, group_field)
    seen: set[bytes] = set()
    for where, row in rows:
        if isinstance(row, BadGroup) and distinct == "group":
            raise ValueError(f"{where}: {row}")
        if isinstance(row, str):
            report.bad_rows.append(f"{where}: {row}")
            continue
        key = row.text if distinct == "text" else f"{row.group}\0{row.text}"
        digest = hashlib.sha256(key.encode()).digest()
        if digest in seen:
            report.duplicates += 1
            continue
        seen.add(digest)
        report.documents += 1
        yield row._replace(where=where)
    if not report.documents:
        bad = report.bad_rows
        raise ValueError(
            f"{source}: no usable document found (expected a field {text_field!r} with text)"
            + (f"; {len(bad)} bad rows, the first: {bad[0]}" if bad else "")
        )


def is_heldout(document: Document, share: float) -> bool:
    """Whether a document belongs to the held-out `share`: a function of its group alone."""
    digest = hashlib.sha256(document.group.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def named_source(source: str | Path) -> str:
    """A source by name and state, for the record of a run."""
    return f"{source} ({fingerprint(source)})"


def fingerprint(source: str | Path) -> str:
    """A short name that changes when the files of a source do (names, sizes, times)."""
    digest = hashlib.sha256(str(source).encode())
    if not str(source).startswith("tfds:"):
        for file in _files(source):
            stat = file.stat()
            digest.update(f"{file}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _files(source: str | Path) -> list[Path]:
    if str(source).startswith("corpus:"):
        return [_bundled(str(source).removeprefix("corpus:"))]
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"{path}: no such file or folder; expected one of {', '.join(SUFFIXES)}, "
            "a folder of them, corpus:NAME, or tfds:NAME"
        )
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{path}: the folder holds no file ending in {', '.join(SUFFIXES)}")
    return files


def _bundled(name: str) -> Path:
    file = CORPUS / f"{name}.jsonl"
    if not file.exists():
        known = ", ".join(sorted(f.stem for f in CORPUS.glob("*.jsonl")))
        raise ValueError(f"corpus:{name}: no such text comes with flexolmo_jax; there are {known}")
    return file


def _file_rows(source: str | Path, text_field: str, group_field: str):
    """(where, Document or the reason why there is none) of each row."""
    for file in _files(source):
        if file.suffix == ".jsonl":
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        row = _json_row(line, text_field, group_field)
                        yield f"{file}:{number}", row
        elif file.suffix == ".parquet":
            yield from _parquet_rows(file, text_field, group_field)
        elif file.suffix in TEXT_SUFFIXES:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                yield str(file), f"not UTF-8 ({error.reason})"
            else:
                yield str(file), _document(text, None)
        else:
            raise ValueError(
                f"{file}: cannot read files ending in {file.suffix!r}; "
                f"expected one of {', '.join(SUFFIXES)}"
            )


def _json_row(line: bytes, text_field: str, group_field: str) -> Document | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    if not isinstance(row, dict):
        return f"expected an object, found {type(row).__name__}"
    if text_field not in row:
        return f"no field {text_field!r}"
    return _document(row[text_field], row.get(group_field))


def _parquet_rows(file: Path, text_field: str, group_field: str):
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except Exception as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from error
    names = table.schema_arrow.names
    if text_field not in names:
        raise ValueError(f"{file}: no column {text_field!r}; found {', '.join(names)}")
    columns = [text_field] + [group_field] * (group_field in names)
    number = 0
    for batch in table.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield f"{file}:{number}", _document(row[text_field], row.get(group_field))


def _tfds_rows(source: str, text_field: str, group_field: str):
    import tensorflow_datasets as tfds  # heavy, and needed for this kind of source only

    name, _, only = source.removeprefix("tfds:").removesuffix("]").partition("[")
    try:
        builder = tfds.builder(name)
        splits = builder.as_data_source()
    except Exception as error:
        raise ValueError(
            f"{source}: cannot be read as a prepared TFDS dataset with random access "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); prepare it first with "
            f"`tfds build {name} --file_format=array_record`"
        ) from error
    if only and only not in splits:
        raise ValueError(f"{source}: no split {only!r}; found {', '.join(splits)}")
    for split, rows in splits.items():
        if only and split != only:
            continue
        for number in range(len(rows)):
            row = rows[number]
            where = f"tfds:{name}[{split}]:{number}"
            if text_field not in row:
                raise ValueError(f"{source}: no feature {text_field!r}; found {', '.join(row)}")
            both = row[text_field], row.get(group_field)
            try:
                text, group = (x.decode() if isinstance(x, bytes) else x for x in both)
            except UnicodeDecodeError as error:
                yield where, f"not UTF-8 ({error.reason})"
                continue
            yield where, _document(text, group)


def _document(text: object, group: object) -> Document | str:
    if not isinstance(text, str):
        return f"expected text, found {type(text).__name__}"
    if not text.strip():
        return "empty text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "text that is not valid Unicode"
    try:
        found = group_id(group)
    except ValueError as error:
        return BadGroup(f"group: {error}")
    return Document(text, text if found is None else f"group:{found}")
