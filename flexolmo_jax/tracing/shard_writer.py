"""Writes a shard: documents go to its files as they come, and are sorted at the end."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers

from flexolmo_jax.data.pieces import in_pieces
from flexolmo_jax.data.sources import Document
from flexolmo_jax.data.windows import together
from flexolmo_jax.tracing.layout import DTYPES, entry
from flexolmo_jax.tracing.suffixes import SEPARATOR, as_bytes, sort

MOST_TOKENS = 2**31 // 3 - 2**20  # of a shard: libdivsufsort counts its bytes in 31 bits


def encoded(
    documents: Iterable[Document], tokenizer: tokenizers.Tokenizer, json_text: str
) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its ids, uint32, without control tokens.

    Documents are encoded in batches of limited size; a long one in pieces, where that gives the
    same tokens: the tokenizer needs about a hundred bytes of memory for each byte of its input.
    """
    for batch in together(documents):
        texts = [d.text for d in batch] if len(batch) > 1 else in_pieces(batch[0].text, json_text)
        found = []
        for start in range(0, len(texts), 512):
            some = tokenizer.encode_batch_fast(texts[start : start + 512], add_special_tokens=False)
            found += [np.array(one.ids, np.uint32) for one in some]
        if len(batch) == 1:
            found = [np.concatenate(found)]
        yield from zip(batch, found, strict=True)


class ShardWriter:
    """A shard that is being written.

    Args:
      folder: of the shard; must not exist.
      vocabulary: V.

    Attributes:
      tokens: how many it has so far, separators included.
      documents: how many.
    """

    def __init__(self, folder: Path, vocabulary: int):
        folder.mkdir()
        self.folder, self.tokens, self.documents = folder, 0, 0
        self._counts = np.zeros(vocabulary, np.int64)
        self._line = 0
        self._files: dict[str, BinaryIO] = {kind: open(folder / kind, "wb") for kind in DTYPES}
        self._write("starts", [0])
        self._write("lines", [0])

    def add(self, document: Document, ids: np.ndarray) -> None:
        """Adds a document with its tokens."""
        record = json.dumps(_record(document), ensure_ascii=False).encode()
        self.tokens += len(ids) + 1
        self._line += len(record)
        self.documents += 1
        self._write("tokens", np.append(ids, np.uint32(SEPARATOR)))
        self._write("starts", [self.tokens])
        self._write("lines", [self._line])
        self._files["records"].write(record)
        self._files["digests"].write(digest_of(document))
        np.add.at(self._counts, ids, 1)

    def close(self) -> dict[str, Any]:
        """Sorts, and waits until all is on the disk.

        Returns:
          what `index.json` says of each file.
        """
        self._files["tokens"].flush()
        stored = np.memmap(self.folder / "tokens", DTYPES["tokens"], "r")
        codes = as_bytes(stored, self._counts)
        del stored  # its pages would count as memory of the process
        self._write("order", sort(codes, int(self._counts.sum())))
        self._write("counts", self._counts)
        return finish(self.folder, self._files)

    def abandon(self) -> None:
        """Closes the files, which are of no use."""
        for opened in self._files.values():
            opened.close()

    def _write(self, kind: str, numbers: Any) -> None:
        np.asarray(numbers, DTYPES[kind]).tofile(self._files[kind])


def digest_of(document: Document) -> bytes:
    """The sha256 of a document's text."""
    return hashlib.sha256(document.text.encode()).digest()


def finish(folder: Path, files: dict[str, BinaryIO]) -> dict[str, Any]:
    """Closes a shard's files once they are on the disk; returns what `index.json` says of them."""
    for opened in files.values():
        opened.flush()
        os.fsync(opened.fileno())
        opened.close()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the names, too
    finally:
        os.close(descriptor)
    return {f"{folder.name}/{kind}": entry(folder / kind) for kind in files}


def _record(document: Document) -> dict[str, str]:
    is_alone = document.group == document.text
    return {
        "id": document.id or Path(document.where).name,
        "group": "" if is_alone else document.group.removeprefix("group:"),
        "source": document.source,
        "licence": document.licence,
        "where": document.where,
    }
