"""Documents from anything an owner has: files of many kinds, folders of them, TFDS datasets.

`files.py` decides which files those are, `readers.py` how each is read. Here their rows become
distinct documents, and skipped rows are reported.

Also which documents are held out, which is a property of the text alone: every command that is
told the same held-out share leaves out the same documents, in whatever order they come.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flexolmo_jax.data.files import counted, find_files, kind_of, some_of
from flexolmo_jax.data.groups import group_id
from flexolmo_jax.data.readers import Bad, Row, read_rows
from flexolmo_jax.runtime.console import visible
from flexolmo_jax.storage.files import file_digest

BOM = "\ufeff"  # the byte order mark, which some programs put in front of a text
# What a document's row may say of it, and the fields where it does.
ABOUT = {"id": ("id",), "source": ("source", "url"), "licence": ("licence", "license")}
CORPUS = Path(__file__).parent.parent / "corpus"


class BadGroup(Bad):
    """Why a row cannot be used: what is in its group field is no id."""


class Document(NamedTuple):
    text: str
    group: str  # documents of one group (a book, a patient) are held out together
    where: str = ""  # file:row
    id: str = ""  # these three as the row says, if it does
    source: str = ""
    licence: str = ""


@dataclasses.dataclass
class Report:
    """Statistics of one read: counts, and the locations of rows that were skipped."""

    source: str = ""
    documents: int = 0
    characters: int = 0
    duplicates: int = 0
    bad_rows: list[str] = dataclasses.field(default_factory=list)  # "file:line: why"
    passed_over: list[str] = dataclasses.field(default_factory=list)  # "file: why", below a folder

    def lines(self, most: int = 5) -> list[str]:
        """What to tell the user: what was read in one line, then the first bad rows.

        Empty if nothing was read: of several processes, the first alone has the report.
        """
        if not (self.documents or self.bad_rows):
            return []
        read = f"{counted(self.documents, 'document')}, {counted(self.characters, 'character')}"
        if self.duplicates:
            read += f"; {counted(self.duplicates, 'duplicate')} left out"
        if self.bad_rows:
            read += f"; {counted(len(self.bad_rows), 'bad row')} skipped"
        if self.passed_over:
            read += f"; not read: {some_of(self.passed_over)}"
        out = [f"{self.source}: {read}"]
        out += [f"skipped {row}" for row in self.bad_rows[:most]]
        if len(self.bad_rows) > most:
            out.append(f"... {len(self.bad_rows)} bad rows were skipped in all")
        return out

    def tell(self) -> None:
        """Prints `lines` on standard error: standard output may be JSON."""
        for line in self.lines():
            print(visible(line), file=sys.stderr)


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
      source: a file of JSON Lines, JSON, Parquet, CSV, TSV or text, compressed or not; a folder of
        such files (searched in depth, in the order of their names; see `find_files`);
        "corpus:NAME" of the texts that come with flexolmo_jax; or "tfds:NAME[/CONFIG]" of a
        dataset that is already prepared; with "[SPLIT]" behind it, in brackets, of one split only.
      text_field: the field, or column, that holds the text of a row.
      group_field: the field that names a row's group; rows without it stand alone.
      report: is filled with counts, bad rows (unreadable, no text, empty), and the files of
        a folder that are not read.
      distinct: a repeated text is skipped; with "group", only where its group repeats it, so that
        what is read of a group depends on nothing outside of it.

    Raises:
      ValueError: the source is missing, of an unknown kind, or holds no usable document; with
        distinct="group", a row has something in its group field that is no id.
      OSError: a file cannot be opened, or the disk fails.
    """
    report = Report() if report is None else report
    report.source = str(source)
    if str(source).startswith("tfds:"):
        rows = _tfds_rows(str(source), text_field)
    else:
        files, report.passed_over = _find(source)
        rows = _file_rows(files, text_field, group_field)
    seen: set[bytes] = set()
    for where, row in rows:
        document = _document(row, where, text_field, group_field)
        if isinstance(document, BadGroup) and distinct == "group":
            raise ValueError(f"{where}: {document}")
        if isinstance(document, Bad):
            report.bad_rows.append(f"{where}: {document}")
            continue
        key = document.text if distinct == "text" else f"{document.group}\0{document.text}"
        digest = hashlib.sha256(key.encode()).digest()
        if digest in seen:
            report.duplicates += 1
            continue
        seen.add(digest)
        report.documents += 1
        report.characters += len(document.text)
        yield document
    if not report.documents:
        bad, others = report.bad_rows, report.passed_over
        raise ValueError(
            f"{source}: no usable document found (expected a field {text_field!r} with text)"
            + (f"; {counted(len(bad), 'bad row')}, the first: {bad[0]}" if bad else "")
            + (f"; not read: {some_of(others)}" if others else "")
        )


def first_bytes(documents: Iterable[Document], size: int) -> list[Document]:
    """The first documents, up to the one with which they have `size` bytes of UTF-8."""
    chosen: list[Document] = []
    for document in documents:
        if size <= 0:
            break
        chosen.append(document)
        size -= len(document.text.encode())
    return chosen


def is_heldout(document: Document, share: float) -> bool:
    """Whether a document belongs to the held-out `share`: a function of its group alone."""
    digest = hashlib.sha256(document.group.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def fingerprint(source: str | Path) -> str:
    """A digest of what is in a source: of its files' bytes, in the order in which they are read.

    It is the same wherever the files are, however the path is written, and whenever they were
    copied; it reads all of them (about a second for each gigabyte), once in a process.

    Returns:
      64 hexadecimal digits.

    Raises:
      ValueError: the source is missing, or of an unknown kind.
    """
    digest = hashlib.sha256()
    if str(source).startswith("tfds:"):
        builder, _, only = _tfds_builder(str(source))
        digest.update(f"tfds {only}\n".encode())
        files = sorted(path for path in Path(builder.data_path).rglob("*") if path.is_file())
    else:
        files = _files(source)
    for file in files:
        stat = file.stat()
        content = _digest(file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        digest.update(f"{''.join(kind_of(file) or ())} {content}\n".encode())
    return digest.hexdigest()


def bytes_of(source: str | Path) -> int:
    """Bytes of the files of a source; 0 where they are not known before it is read.

    Raises:
      ValueError: as `find_files`.
    """
    if str(source).startswith(("corpus:", "tfds:")):
        return 0
    return sum(file.stat().st_size for file in _files(source))


@functools.lru_cache(maxsize=100_000)
def _digest(file: Path, *state: int) -> str:
    """sha256 of a file; `state` is another one when the file has been written again."""
    return file_digest(file)


def _files(source: str | Path) -> list[Path]:
    """The files that are read of a source, in order."""
    return _find(source)[0]


def _find(source: str | Path) -> tuple[list[Path], list[str]]:
    """The files that are read of a source, and those of a folder that are not."""
    if str(source).startswith("corpus:"):
        return [_bundled(str(source).removeprefix("corpus:"))], []
    return find_files(Path(source))


def _bundled(name: str) -> Path:
    file = CORPUS / f"{name}.jsonl"
    if not file.exists():
        known = ", ".join(sorted(f.stem for f in CORPUS.glob("*.jsonl")))
        raise ValueError(f"corpus:{name}: no such text comes with flexolmo_jax; there are {known}")
    return file


def _file_rows(files: list[Path], text_field: str, group_field: str) -> Iterator[tuple[str, Row]]:
    """("file:place", row) of all files."""
    for file in files:
        others = [name for names in ABOUT.values() for name in names]
        for place, row in read_rows(file, text_field, group_field, others):
            yield str(file) if place is None else f"{file}:{place}", row


def _tfds_builder(source: str):
    """(builder, name, the one split that is asked for) of a prepared TFDS dataset."""
    import tensorflow_datasets as tfds  # heavy, and needed for this kind of source only

    name, _, only = source.removeprefix("tfds:").removesuffix("]").partition("[")
    try:
        builder = tfds.builder(name)
        builder.as_data_source()
        return builder, name, only
    except Exception as error:
        raise ValueError(
            f"{source}: cannot be read as a prepared TFDS dataset with random access "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); prepare it first with "
            f"`tfds build {name} --file_format=array_record`"
        ) from error


def _tfds_rows(source: str, text_field: str) -> Iterator[tuple[str, Row]]:
    builder, name, only = _tfds_builder(source)
    splits = builder.as_data_source()
    if only and only not in splits:
        raise ValueError(f"{source}: no split {only!r}; found {', '.join(splits)}")
    for split, rows in splits.items():
        if only and split != only:
            continue
        for number in range(len(rows)):
            row = rows[number]
            if text_field not in row:
                raise ValueError(f"{source}: no feature {text_field!r}; found {', '.join(row)}")
            yield f"tfds:{name}[{split}]:{number}", row


def _document(row: Row, where: str, text_field: str, group_field: str) -> Document | Bad:
    """The document of a row, or why there is none: the same rules for every kind of source."""
    if isinstance(row, Bad):
        return row
    if text_field not in row:
        return Bad(f"no field {text_field!r}")
    try:
        text, group = _decoded(row[text_field]), _decoded(row.get(group_field))
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 ({error.reason})")
    if not isinstance(text, str):
        return Bad(f"expected text, found {type(text).__name__}")
    text = text.removeprefix(BOM)
    if not text.strip():
        return Bad("empty text")
    try:
        text.encode()
        name = group_id(group)
        (name or "").encode()
    except UnicodeEncodeError:
        return Bad("text that is not valid Unicode")
    except RecursionError:
        return BadGroup(f"{group_field}: nested too deeply")
    except ValueError as error:
        return BadGroup(f"{group_field}: {error}")
    about = {field: _first(row, names) for field, names in ABOUT.items()}
    return Document(text, text if name is None else f"group:{name}", where, **about)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of a row's fields that is a text or a whole number, as a text; else nothing."""
    for name in names:
        value = row.get(name)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value).encode(errors="replace").decode()
    return ""


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
