"""Rows of clean text: long documents are split into pieces, stubs are dropped.

A row is a dictionary of three strings: `text`, `source` (a short id such as "stdlib/argparse.py")
and `group` (pieces of one book, file, article or thread share it, so that a held-out split by
group never has one half of a document on each side).
"""

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

Row = dict[str, str]

MINIMUM = 120  # characters; anything shorter is a stub, not a document
LIMIT = 8_000  # bytes; longer documents become several rows of one group


def pieces(text: str, limit: int = LIMIT) -> Iterator[str]:
    """Cuts a text at blank lines, else lines, else spaces, into pieces of at most `limit` bytes."""
    if len(text.encode()) <= limit:
        yield text
        return
    separator = next((mark for mark in ("\n\n", "\n", " ") if mark in text), None)
    if separator is None:
        return  # a "word" above the limit is an embedded picture or a table of bytes, not text
    held = ""
    for part in text.split(separator):
        joined = held + separator + part if held else part
        if len(joined.encode()) <= limit:
            held = joined
            continue
        if held:
            yield held
        held = ""
        if len(part.encode()) <= limit:
            held = part
        else:
            yield from pieces(part, limit)
    if held:
        yield held


def rows(text: str, source: str, group: str | None = None) -> Iterator[Row]:
    """One row for a short document, several of one group for a long one, none for a stub."""
    text = re.sub(r"\n{3,}", "\n\n", text.replace("\r\n", "\n").replace("\0", "")).strip("\n")
    for piece in pieces(text):
        if len(piece.strip()) >= MINIMUM:
            yield {"text": piece.strip("\n"), "source": source, "group": group or source}


def read_text(path: Path) -> str:
    """The text of a file, gunzipped: UTF-8, or else Latin-1, as old corpora are."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def matching_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that match, sorted.

    Raises:
      FileNotFoundError: there is none, so this is not the package that was expected.
    """
    if found := sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        return found
    raise FileNotFoundError(f"no {' or '.join(patterns)} in {folder.name}")
