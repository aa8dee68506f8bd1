"""Token files of OLMo-core and the Dolma toolkit: raw ids, written back as texts.

Such a file, `NAME.npy`, holds the ids of documents one after the other, without a header. Where
documents begin and end is in `NAME.csv.gz`, a line `start,end,...` for each.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.storage.files import new_file

DTYPES = ("uint8", "uint16", "uint32", "uint64")
_BATCH = 1024  # documents


class Written(NamedTuple):
    """What was written.

    Attributes:
      documents, tokens: of them.
      changed: documents that have other tokens when their texts are encoded again: those that are
        cut within a character, or hold a control token.
      inferred: files without borders of documents, which were cut at the separator.
    """

    documents: int
    tokens: int
    changed: int
    inferred: list[Path]


def write_texts(
    files: Sequence[Path], tokenizer: Tokenizer, out: Path, dtype: str | None = None
) -> Written:
    """Writes the documents of token files as JSON Lines with a field `text`.

    The separator before and after a document is no part of its text. Empty documents are left out.

    Args:
      files: each with its NAME.csv.gz beside it, or without.
      tokenizer: that they were made with.
      out: replaced, if it exists.
      dtype: of the ids; default: the smallest that holds all of the tokenizer's, as in OLMo-core.

    Raises:
      ValueError: a file cannot be read, has ids that the tokenizer does not have, or borders
        outside of it.
    """
    dtype = dtype or next(x for x in DTYPES if tokenizer.vocab_size - 1 <= np.iinfo(x).max)
    documents = tokens = changed = 0
    inferred: list[Path] = []
    with new_file(out) as opened:
        for file in files:
            ids = _open(file, dtype, tokenizer)
            metadata = file.with_suffix(".csv.gz")
            if metadata.is_file():
                borders = _borders(metadata, len(ids))
            else:
                inferred.append(file)
                borders = _between(ids, tokenizer.separator)
            for batch in _batches(ids, borders, tokenizer.separator):
                texts = [tokenizer.decode(document) for document in batch]
                for text in texts:
                    opened.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                documents, tokens = documents + len(batch), tokens + sum(map(len, batch))
                changed += sum(
                    _encoded(text, tokenizer) != ids_of_it
                    for text, ids_of_it in zip(texts, batch, strict=True)
                )
        if not documents:
            raise ValueError(f"{files[0]}: expected documents, found none in these files")
    return Written(documents, tokens, changed, inferred)


def _open(file: Path, dtype: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a file, which stay in it."""
    try:
        with open(file, "rb") as opened:
            has_header = opened.read(6) == b"\x93NUMPY"
        ids = np.load(file, mmap_mode="r") if has_header else np.memmap(file, dtype, "r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a file of {dtype} ids ({error})") from error
    if ids.ndim != 1 or ids.dtype.kind != "u":
        raise ValueError(f"{file}: expected a row of ids, found {ids.dtype} {list(ids.shape)}")
    for first in range(0, len(ids), 2**24):
        part = ids[first : first + 2**24]
        if part.max() >= tokenizer.vocab_size:
            place = first + int(part.argmax())
            raise ValueError(
                f"{file}: the id {ids[place]} at {place}: expected ids below "
                f"{tokenizer.vocab_size}, which the tokenizer has; was the file made with another "
                "tokenizer, or another --dtype?"
            )
    return ids


def _borders(metadata: Path, count: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each document."""
    try:
        with gzip.open(metadata, "rt", encoding="utf-8", newline="") as opened:
            for number, row in enumerate(csv.reader(opened), 1):
                start, end = int(row[0]), int(row[1])
                if not 0 <= start <= end <= count:
                    raise ValueError(
                        f"line {number}: expected borders within the {count} ids, found "
                        f"{start} and {end}"
                    )
                yield start, end
    except (OSError, EOFError, zlib.error, csv.Error, IndexError, ValueError) as error:
        raise ValueError(f"{metadata}: cannot read the borders of documents ({error})") from error


def _between(ids: np.ndarray, separator: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what lies between separators."""
    start = 0
    for end in np.flatnonzero(ids == separator).tolist():
        yield start, end
        start = end + 1
    yield start, len(ids)


def _batches(
    ids: np.ndarray, borders: Iterator[tuple[int, int]], separator: int
) -> Iterator[list[list[int]]]:
    """Documents that are not empty, without the separators around them."""
    batch: list[list[int]] = []
    for start, end in borders:
        while start < end and ids[start] == separator:
            start += 1
        while start < end and ids[end - 1] == separator:
            end -= 1
        if start < end:
            batch.append(ids[start:end].tolist())
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _encoded(text: str, tokenizer: Tokenizer) -> list[int] | None:
    """The ids of a text as training reads it; None if it refuses the text."""
    try:
        return tokenizer.encode_documents([text])[0][1:]
    except ValueError:
        return None
