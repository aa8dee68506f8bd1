"""An owner's index: which documents hold which tokens, verbatim. Opened only if it is intact."""

import concurrent.futures
import dataclasses
import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from flexolmo_jax.tracing import suffixes
from flexolmo_jax.tracing.layout import DTYPES, LOCK, TOKENIZER, read_index


class Occurrence(NamedTuple):
    """A place in a document.

    Attributes:
      document: its number in the index.
      start: of its tokens, the one where the match begins.
    """

    document: int
    start: int


class DocumentRecord(NamedTuple):
    """What an index knows of a document besides its text; empty where its row did not say.

    Attributes:
      id: as its owner names it; of a row without an id, its file and row.
      group: as the group field says.
      source, licence: as the fields `source` (or `url`) and `licence` (or `license`) say.
      where: file:row, as it was read.
      tokens: how many it has.
    """

    id: str
    group: str
    source: str
    licence: str
    where: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """The files of a shard as arrays, in memory maps; see `layout.py`."""

    suffixes: suffixes.Suffixes
    starts: np.ndarray
    lines: np.ndarray
    records: np.ndarray

    def record(self, number: int) -> DocumentRecord | None:
        """Of the document of this number in the shard; None of a withdrawn one."""
        begin, end = self.lines[number : number + 2].tolist()
        if begin == end:
            return None
        fields = json.loads(self.records[begin:end].tobytes())
        return DocumentRecord(**fields, tokens=self.size(number))

    def size(self, number: int) -> int:
        """Tokens of a document that is not withdrawn."""
        begin, end = self.starts[number : number + 2].tolist()
        return end - 1 - begin


class Index:
    """The index of one owner's documents, all of its shards.

    Nothing in it changes once it is open, whatever other processes do to its folder.

    Attributes:
      folder: where it is.
      owner: whose documents they are.
      tokenizer: that of the documents.
      tokenizer_digest: sha256 of its tokenizer.json.
      vocabulary_size: V: ids are below it.
      num_tokens, num_documents: without withdrawn documents.
      counts: int64 [V]: how often each token occurs.
    """

    def __init__(self, folder: Path, about: dict[str, Any], tokenizer: str, shards: list[Shard]):
        self.folder, self.owner = folder, about["owner"]
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
        self.tokenizer.encode_special_tokens = True  # a text is only ever text
        self.tokenizer_digest = about["tokenizer"]
        self.vocabulary_size = about["vocabulary_size"]
        self.num_documents = sum(int((np.diff(s.lines) > 0).sum()) for s in shards)
        self.counts = sum(
            (np.diff(shard.suffixes.buckets) for shard in shards),
            start=np.zeros(self.vocabulary_size, np.int64),
        )
        self.num_tokens = int(self.counts.sum())
        self._shards = shards
        sizes = [len(shard.lines) - 1 for shard in shards]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Opens an index after hashing every file of it.

        Raises:
          ValueError: the folder holds no complete index, or a file of it was changed, cut,
            exchanged, added or removed; names the first one.
        """
        folder = Path(folder)
        about = read_index(folder)
        maps = _verified(folder, about["files"])
        shards = [_shard(maps, name, about["vocabulary_size"]) for name in about["shards"]]
        return cls(folder, about, bytes(maps[TOKENIZER]).decode(), shards)

    def encode(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """A text's tokens, as the documents' were made.

        Returns:
          ids: uint32 [L]; and of each token the characters [start, stop) that it stands for.
        """
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoded.ids, np.uint32), encoded.offsets

    def longest_matches(self, ids: np.ndarray) -> np.ndarray:
        """Of each position of a text, how many tokens from there on stand in one document.

        Args:
          ids: uint32 [L].

        Returns:
          int32 [L].
        """
        longest = np.zeros(len(ids), np.int32)
        for shard in self._shards:
            np.maximum(longest, suffixes.longest_matches(shard.suffixes, ids), out=longest)
        return longest

    def find(self, ids: np.ndarray, most: int | None = None) -> tuple[int, list[Occurrence]]:
        """Where tokens stand one after the other in documents.

        Args:
          ids: uint32 [L], at least one.
          most: how many places to return at most (default: all of them); they are spread evenly
            over the order of the suffixes, and the same each time.

        Returns:
          how often they occur, and places.
        """
        ids = np.asarray(ids, np.uint32)
        if not len(ids):
            raise ValueError("find: expected at least one token, found none")
        ranges = [suffixes.find(shard.suffixes, ids) for shard in self._shards]
        before = np.cumsum([0, *(stop - start for start, stop in ranges)])
        count = int(before[-1])
        kept = count if most is None else min(most, count)
        picked = (2 * np.arange(kept) + 1) * count // (2 * max(kept, 1))
        of_shard = np.searchsorted(before, picked, side="right") - 1
        found = []
        for rank, number in zip(picked.tolist(), of_shard.tolist(), strict=True):
            shard = self._shards[number]
            place = int(shard.suffixes.order[ranges[number][0] + rank - before[number]])
            document = int(np.searchsorted(shard.starts, place, side="right")) - 1
            found.append(
                Occurrence(int(self._first[number]) + document, place - int(shard.starts[document]))
            )
        return count, found

    def numbers(self) -> Iterator[int]:
        """The numbers of all documents that are not withdrawn, in order."""
        for first, shard in zip(self._first.tolist(), self._shards, strict=False):
            yield from (first + np.flatnonzero(np.diff(shard.lines))).tolist()

    def document(self, number: int) -> DocumentRecord:
        """What is known of a document. Raises ValueError if there is none of this number."""
        shard, own = self._place(number)
        record = shard.record(own)
        if record is None:
            raise ValueError(f"{self.folder}: document {number} was withdrawn")
        return record

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, uint32; fewer where it ends before."""
        shard, own = self._place(document)
        size = self.document(document).tokens
        begin = int(shard.starts[own])
        start, stop = (min(max(edge, 0), size) for edge in (start, stop))
        return np.array(shard.suffixes.tokens[begin + start : begin + stop])

    def _place(self, number: int) -> tuple[Shard, int]:
        if not 0 <= number < self._first[-1]:
            raise ValueError(f"{self.folder}: there is no document {number}")
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._shards[shard], number - int(self._first[shard])


def _verified(folder: Path, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Memory maps of all files, which are exactly those listed, and hold the listed bytes."""
    found = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.is_dir() and path.name not in (LOCK, "index.json")
    }
    for name in sorted(found ^ files.keys()):
        what = "unexpected file; delete it" if name in found else "missing; index again"
        raise ValueError(f"{folder / name}: {what}")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        maps = pool.map(lambda name: _open(folder / name, files[name]), files)
        return dict(zip(files, maps, strict=True))


def _open(file: Path, expected: dict[str, Any]) -> Any:
    if file.is_symlink() or not file.is_file():
        raise ValueError(f"{file}: expected a regular file, found something else")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(
            f"{file}: damaged: expected {expected['bytes']:,} bytes, found {size:,}; index again"
        )
    if not size:
        return b""
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if hashlib.sha256(mapped).hexdigest() != expected["sha256"]:
        raise ValueError(f"{file}: damaged: its sha256 is not the one in index.json; index again")
    return mapped


def _shard(maps: dict[str, Any], name: str, vocabulary: int) -> Shard:
    def array(kind: str) -> np.ndarray:
        return np.frombuffer(maps[f"{name}/{kind}"], DTYPES[kind])

    buckets = np.concatenate([[0], np.cumsum(array("counts"))]).astype(np.int64)
    return Shard(
        suffixes.Suffixes(array("tokens"), array("order"), buckets),
        array("starts"),
        array("lines"),
        array("records"),
    )
