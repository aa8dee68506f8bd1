"""Suffix arrays over token ids: made by sorting, searched for many positions of a text at once.

A shard's tokens are its documents one after the other, each followed by `SEPARATOR`. Its suffix
array lists all places that hold a token of a document, ordered by the tokens that begin there. So
the places that begin with the same tokens stand side by side, and a binary search finds them. No
text that is asked about holds a separator, so no match crosses the border of a document.
"""

from typing import NamedTuple

import numpy as np

SEPARATOR = 2**32 - 1  # behind every document; no token has this id
NO_TOKEN = 2**32 - 2  # behind the text that is asked about; equal to nothing in a shard
HIGHEST = 2**24 - 2  # the highest id that can be sorted
_DEPTHS = (8, 32)  # tokens that are compared at a time, after the first one is equal
_CHUNK = 2**16  # entries that are changed at a time


class Suffixes(NamedTuple):
    """A shard's tokens, and the order of its suffixes.

    Attributes:
      tokens: uint32 [N], with a `SEPARATOR` at the end.
      order: int32 [M], places in `tokens`.
      buckets: int64 [V + 1]: the places that begin with token t are order[buckets[t]:buckets[t+1]].
    """

    tokens: np.ndarray
    order: np.ndarray
    buckets: np.ndarray


def as_bytes(tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Tokens in the bytes that are sorted: two or three for each, in the order of the ids.

    Args:
      tokens: uint32 [N], separators included.
      counts: int64 [V]: how often each id occurs.

    Returns:
      uint8 [N, 2 or 3].
    """
    present = np.cumsum(counts > 0)  # the rank of each id among those that occur, from 1
    width = 2 if present[-1] < 2**16 - 1 else 3
    codes = np.full((len(tokens), width), 255, np.uint8)  # separators are last
    for start in range(0, len(tokens), _CHUNK):
        part = tokens[start : start + _CHUNK]
        own = np.flatnonzero(part != SEPARATOR)
        ranks = present[part[own]] - 1
        for byte in range(width):
            codes[start + own, byte] = ranks >> 8 * (width - 1 - byte) & 255
    return codes


def sort(codes: np.ndarray, count: int) -> np.ndarray:
    """The order of the suffixes that begin with a token of a document.

    libdivsufsort sorts bytes, and needs 4 more for each of them, and we need no others: so at most
    15 bytes of memory for each token, the codes included.

    Args:
      codes: as `as_bytes` returns them.
      count: of the tokens without separators.

    Returns:
      int32 [count], places of tokens.
    """
    import pydivsufsort

    width = codes.shape[1]
    order = pydivsufsort.divsufsort(codes.reshape(-1))  # int32 [N * width]: of all bytes
    found = 0
    for start in range(0, len(order), _CHUNK):
        part = order[start : start + _CHUNK]
        part = part[part % width == 0] // width
        order[found : found + len(part)] = part  # never ahead of what is read
        found += len(part)
    return order[:count]


def longest_matches(shard: Suffixes, ids: np.ndarray) -> np.ndarray:
    """Of each position of a text, how many tokens from there on occur together in the shard.

    The search for a suffix of the text compares it with both of its neighbours in the order, and
    no other suffix of the shard shares more tokens with it than one of these.

    Args:
      ids: uint32 [L].

    Returns:
      int32 [L].
    """
    length = np.zeros(len(ids), np.int32)
    if not len(ids) or not len(shard.order):
        return length
    asked, low, high = _lanes(shard, ids)
    lanes = np.flatnonzero(low < high)
    length[lanes] = 1
    low, high = low[lanes], high[lanes]
    below, above = np.ones_like(lanes), np.ones_like(lanes)  # tokens shared with the neighbours
    while len(lanes):
        middle = (low + high) >> 1
        places = shard.order[middle].astype(np.int64)
        shared, is_less = _compare(shard.tokens, places, asked, lanes, np.minimum(below, above))
        length[lanes] = np.maximum(length[lanes], shared)
        low, high = np.where(is_less, middle + 1, low), np.where(is_less, high, middle)
        below, above = np.where(is_less, shared, below), np.where(is_less, above, shared)
        is_open = low < high
        if not is_open.all():
            lanes, low, high, below, above = (x[is_open] for x in (lanes, low, high, below, above))
    return length


def find(shard: Suffixes, ids: np.ndarray) -> tuple[int, int]:
    """Where in the order the places stand that begin with all of `ids`.

    Args:
      ids: uint32 [L], at least one.

    Returns:
      start and stop; both 0 if one of the ids is none of the vocabulary.
    """
    if int(ids.max()) >= len(shard.buckets) - 1:
        return 0, 0
    pattern, count = ids.tolist(), len(ids)

    def edge(low: int, high: int, inclusive: bool) -> int:
        while low < high:
            middle = (low + high) >> 1
            place = int(shard.order[middle])
            found = shard.tokens[place : place + count].tolist()
            if found < pattern or (inclusive and found == pattern):
                low = middle + 1
            else:
                high = middle
        return low

    low, high = shard.buckets[pattern[0] : pattern[0] + 2].tolist()
    start = edge(low, high, inclusive=False)
    return start, edge(start, high, inclusive=True)


def _lanes(shard: Suffixes, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The text, with `NO_TOKEN` for unknown ids and at its end; and the bucket of each token."""
    vocabulary = len(shard.buckets) - 1
    asked = np.append(np.where(ids < vocabulary, ids, NO_TOKEN), NO_TOKEN).astype(np.uint32)
    first = np.where(asked[:-1] < vocabulary, asked[:-1], 0).astype(np.int64)
    low = shard.buckets[first]
    high = np.where(asked[:-1] < vocabulary, shard.buckets[first + 1], low)
    return asked, low, high


def _compare(
    tokens: np.ndarray, places: np.ndarray, asked: np.ndarray, starts: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens suffixes of the shard share with suffixes of the text, and which are less.

    Args:
      places: int64 [n], in `tokens`.
      starts: int64 [n], in `asked`.
      known: int64 [n]: that many tokens are equal.

    Returns:
      shared: int64 [n]; is_less: bool [n], whether the shard's suffix is before the text's.
    """
    shared = known.copy()
    found, wanted = tokens[places + shared], asked[starts + shared]
    is_less = found < wanted
    tied = np.flatnonzero(found == wanted)
    for depth in _DEPTHS:
        if not len(tied):
            break
        shared[tied] += 1
        span = np.arange(depth)
        found = tokens.take((places[tied] + shared[tied])[:, None] + span, mode="clip")
        wanted = asked.take((starts[tied] + shared[tied])[:, None] + span, mode="clip")
        differs = found != wanted  # `asked` ends with a token that differs from all
        first = differs.argmax(1)
        row = np.arange(len(tied))
        ends = differs[row, first]
        is_less[tied] = found[row, first] < wanted[row, first]
        shared[tied] += np.where(ends, first, depth - 1)
        tied = tied[~ends]
    if len(tied):
        shared[tied] = _along_diagonals(tokens, places[tied], asked, starts[tied])
        is_less[tied] = tokens[places[tied] + shared[tied]] < asked[starts[tied] + shared[tied]]
    return shared, is_less


def _along_diagonals(
    tokens: np.ndarray, places: np.ndarray, asked: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """How many tokens suffixes share that share many: int64 [n], by text that is compared once.

    Where a long passage of the text stands in a document, all of its suffixes match along with it:
    places minus starts are equal. Comparing each by itself would need the square of its length.
    """
    diagonals, own = np.unique(places - starts, return_inverse=True)
    columns = np.arange(len(asked))
    shared = np.empty(len(places), np.int64)
    rows = max(1, _CHUNK // len(asked))
    for first in range(0, len(diagonals), rows):
        part = diagonals[first : first + rows]
        differs = tokens.take(part[:, None] + columns, mode="clip") != asked
        ends = np.where(differs, columns, len(asked))
        ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]  # the first from there on
        lanes = np.flatnonzero((own >= first) & (own < first + len(part)))
        shared[lanes] = ends[own[lanes] - first, starts[lanes]] - starts[lanes]
    return shared
