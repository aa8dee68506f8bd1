"""An owner's index: which documents hold which tokens, verbatim. Opened only if it is intact."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from flexolmo_jax.tracing import suffixes
from flexolmo_jax.tracing.layout import TOKENIZER, read_tokenizer
from flexolmo_jax.tracing.verified import Maps, array, open_files


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

    def __init__(
        self,
        folder: Path,
        owner: str,
        tokenizer: tokenizers.Tokenizer,
        tokenizer_digest: str,
        shards: list[Shard],
    ):
        """Use `open`."""
        self.folder, self.owner = folder, owner
        self.tokenizer, self.tokenizer_digest = tokenizer, tokenizer_digest
        self.num_documents = sum(int((np.diff(s.lines) > 0).sum()) for s in shards)
        self.counts = np.sum([np.diff(shard.suffixes.buckets) for shard in shards], axis=0)
        self.vocabulary_size = len(self.counts)
        self.num_tokens = int(self.counts.sum())
        self.shards = shards
        sizes = [len(shard.lines) - 1 for shard in shards]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Opens an index after hashing every file of it.

        Raises:
          ValueError: the folder holds no complete index, or a file of it was changed, cut,
            exchanged, added or removed; names the first one.
        """
        about, maps = open_files(Path(folder))
        where = Path(folder) / TOKENIZER
        tokenizer, vocabulary, _ = read_tokenizer(bytes(maps[TOKENIZER]).decode(), where)
        if vocabulary != about["vocabulary_size"]:
            raise ValueError(
                f"{where}: expected {about['vocabulary_size']} ids, found {vocabulary}; index again"
            )
        shards = [_shard(maps, name) for name in about["shards"]]
        return cls(Path(folder), about["owner"], tokenizer, about["tokenizer"], shards)

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
        ids = np.asarray(ids, np.uint32)
        longest = np.zeros(len(ids), np.int32)
        for shard in self.shards:
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
        ranges = [suffixes.find(shard.suffixes, ids) for shard in self.shards]
        count = sum(stop - start for start, stop in ranges)
        kept = count if most is None else min(most, count)
        places: list[Occurrence] = []
        if not kept:
            return count, places
        picked = (2 * np.arange(kept) + 1) * count // (2 * kept)
        before = 0
        for first, shard, (start, stop) in zip(self._first, self.shards, ranges, strict=False):
            own = picked[(picked >= before) & (picked < before + stop - start)]
            found = shard.suffixes.order[start + own - before]
            documents = np.searchsorted(shard.starts, found, side="right") - 1
            at = (first + documents).tolist(), (found - shard.starts[documents]).tolist()
            places += map(Occurrence, *at)
            before += stop - start
        return count, places

    def numbers(self) -> Iterator[int]:
        """The numbers of all documents that are not withdrawn, in order."""
        for first, shard in zip(self._first.tolist(), self.shards, strict=False):
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
        return self.shards[shard], number - int(self._first[shard])


def _shard(maps: Maps, name: str) -> Shard:
    tokens, order, counts, starts, lines, records = (
        array(maps, name, kind)
        for kind in ("tokens", "order", "counts", "starts", "lines", "records")
    )
    buckets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Shard(suffixes.Suffixes(tokens, order, buckets), starts, lines, records)
