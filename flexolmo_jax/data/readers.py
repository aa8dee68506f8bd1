"""Files to rows: one function for each kind of file, and what can go wrong with a single row.

A reader yields pairs (place, row) in the order of the file. A row is a mapping of fields to values,
or a `Bad` reason why it cannot be used: bad rows are skipped and named, and never end a read.
Places are line numbers where rows have lines, otherwise the numbers of the rows, from 1.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from flexolmo_jax.data.files import JSON, JSON_LINES, PARQUET, TABLES, kind_of

BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)  # a compressed stream


class Bad(str):
    """Why a row cannot be used."""


Row = Mapping[str, Any] | Bad


def read_rows(
    file: Path, text_field: str, group_field: str, others: Sequence[str] = ()
) -> Iterator[tuple[int | None, Row]]:
    """Every row of a file; a text file is one row, with its text in the field of that name.

    Args:
      file: of a kind that `files.kind_of` knows.
      text_field, group_field: the fields that are wanted.
      others: fields that are wanted where a row has them; rows may hold more.

    Yields:
      the place in the file, None for all of it, and the row.

    Raises:
      ValueError: a table without a column of text, or no Parquet file.
    """
    kind = kind_of(file)
    assert kind is not None
    if kind.suffix in JSON_LINES:
        return _json_lines(file)
    if kind.suffix in JSON:
        return _json(file)
    if kind.suffix in PARQUET:
        from flexolmo_jax.data import parquet  # pyarrow is large, and not on every machine

        return parquet.rows(file, text_field, group_field, others)
    if kind.suffix in TABLES:
        delimiter = "\t" if kind.suffix == ".tsv" else ","
        return _table(file, text_field, group_field, delimiter)
    return _text(file, text_field)


def _open(file: Path) -> IO[bytes]:
    """The bytes of a file, decompressed."""
    kind = kind_of(file)
    compression = kind.compression if kind else ""
    if compression == ".zst":
        import pyarrow  # its own stream cannot be read line by line

        stream: Any = pyarrow.input_stream(str(file), compression="zstd")
        return io.BufferedReader(stream)
    openers: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return openers.get(compression, open)(file, "rb")


def _lines(file: Path) -> Iterator[tuple[int, bytes | Bad]]:
    """The lines of a file that are not blank; a broken stream ends with a bad one."""
    number = 0
    try:
        with _open(file) as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    yield number, line
    except BROKEN as error:
        yield number + 1, _broken(file, error)


def _whole(file: Path) -> str | Bad:
    """All of a file, as text; ends of lines are "\\n"."""
    try:
        with _open(file) as opened:
            return io.TextIOWrapper(opened, encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 ({error.reason})")
    except BROKEN as error:
        return _broken(file, error)


def _broken(file: Path, error: Exception) -> Bad:
    """What to say of a compressed stream; a plain file that cannot be read is no bad row."""
    kind = kind_of(file)
    if kind is None or not kind.compression:
        raise error
    return Bad(f"the compressed file cannot be read from here on ({error})")


def _text(file: Path, text_field: str) -> Iterator[tuple[None, Row]]:
    found = _whole(file)
    yield None, found if isinstance(found, Bad) else {text_field: found}


def _json_lines(file: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(file):
        yield number, line if isinstance(line, Bad) else _json_row(line)


def _json_row(line: bytes) -> Row:
    try:
        return _object(json.loads(line))
    except RecursionError:
        return Bad("JSON that is nested too deeply")
    except ValueError as error:
        return Bad(f"not JSON ({error})")


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        return Bad(f"expected an object, found {type(value).__name__}")
    return value


def _json(file: Path) -> Iterator[tuple[int, Row]]:
    """Of a .json file: JSON Lines, an array of objects, or objects over several lines."""
    _, first = next(_lines(file), (0, b""))
    # An array may be all of the file in one line; that is parsed once, item by item, below.
    is_array = not isinstance(first, Bad) and first.removeprefix(codecs.BOM_UTF8).startswith(b"[")
    if not is_array and (isinstance(first, Bad) or not isinstance(_json_row(first), Bad)):
        return _json_lines(file)
    del first
    text = _whole(file)
    if isinstance(text, Bad):
        return _json_lines(file)  # line by line there may be something to read
    rows = _json_values(text)
    start = list(itertools.islice(rows, 1))
    if start and isinstance(start[0][1], Bad) and not text.lstrip().startswith("["):
        return _json_lines(file)
    return itertools.chain(start, rows)


def _json_values(text: str) -> Iterator[tuple[int, Row]]:
    """The items of an array, or values one after the other, up to the first that is no JSON."""
    decoder = json.JSONDecoder()

    def after_space(place: int) -> int:
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
        return place

    place = after_space(0)
    in_array = text.startswith("[", place)
    place = after_space(place + in_array)
    for number in itertools.count(1):
        if place == len(text) and not in_array:
            return
        if in_array and text.startswith("]", place):
            if after_space(place + 1) < len(text):
                yield number, Bad("not JSON (more text behind the array)")
            return
        try:
            value, place = decoder.raw_decode(text, place)
        except RecursionError:
            yield number, Bad("JSON that is nested too deeply; the rest of the file is not read")
            return
        except ValueError as error:
            yield number, Bad(f"not JSON ({error}); the rest of the file is not read")
            return
        yield number, _object(value)
        place = after_space(place)
        if in_array and text.startswith(",", place):
            place = after_space(place + 1)


def check_columns(file: Path, names: list[str], text_field: str, group_field: str) -> None:
    """Raises ValueError if there is not one column of text, or more than one of groups."""
    if text_field not in names:
        raise ValueError(f"{file}: no column {text_field!r}; found {', '.join(names)}")
    for name in (text_field, group_field):
        if names.count(name) > 1:
            raise ValueError(
                f"{file}: expected one column {name!r}, found {names.count(name)}; rename others"
            )


def _table(
    file: Path, text_field: str, group_field: str, delimiter: str
) -> Iterator[tuple[int, Row]]:
    """Rows of CSV or TSV, quoted as in RFC 4180; the first row names the columns."""
    csv.field_size_limit(2**31 - 1)  # the default would refuse texts of 128 kB
    number = 1
    try:
        with _open(file) as opened:
            # Bytes that are not UTF-8 become surrogates, so that only the rows with them are bad.
            lines = io.TextIOWrapper(
                opened, encoding="utf-8-sig", errors="surrogateescape", newline=""
            )
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            try:
                names = next(reader, [])
            except csv.Error as error:
                raise ValueError(f"{file}: no row of column names ({error})") from error
            check_columns(file, names, text_field, group_field)
            while True:
                number = reader.line_num + 1
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    yield number, Bad(f"not a row of a table ({error})")
                    continue
                if row is None:
                    return
                if len(row) == len(names):
                    yield number, dict(zip(names, row, strict=True))
                elif row:
                    yield number, Bad(f"expected {len(names)} columns, found {len(row)}")
    except BROKEN as error:
        yield number, _broken(file, error)
