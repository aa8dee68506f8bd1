"""Attention to keys and values in pages, of which each sequence of a batch has as many as it needs.

A pool of pages serves all slots of an engine (PagedAttention; Kwon et al. 2023). Attention reads
the pages that are in use, and not every slot as far as the longest sequence reaches.
"""

import functools
import heapq
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.attention import (
    LEAST,
    SoftmaxSums,
    attend_to_part,
    by_token,
    queries_by_kv_head,
)
from flexolmo_jax.modeling.decode_state import KVCache, SegmentedCache

PAGE = 64  # tokens
MAX_GROUPS = 16  # more are read more exactly, but compile longer
# Of one layer, in groups of equally many pages; each [P / groups, K, PAGE, H]. A group is read if a
# page of it is in use. Of groups of other sizes, XLA's matmuls would give other bits.
Pool = tuple[KVCache, ...]


class Pages(NamedTuple):
    """Where the keys and values of each sequence are.

    Attributes:
      table: int32 [B, blocks], the page of each block of PAGE tokens; where there is none, the size
        of the pool.
      rows, blocks: int32 [P], of each page that is in use: whose it is, and which of its blocks.
      is_used: bool [groups], whether a page of the group is in use.
    """

    table: jax.Array
    rows: jax.Array
    blocks: jax.Array
    is_used: jax.Array


def pool_groups(slots: int, length: int) -> tuple[int, int]:
    """The groups of a pool for sequences of at most `length` tokens, and the pages of each."""
    blocks = -(-length // PAGE)
    size = -(-blocks // MAX_GROUPS)
    return -(-blocks // size), slots * size


class PageTable:
    """Which pages each slot has.

    Args:
      slots: how many sequences there are at a time.
      length: the most tokens of one.
    """

    def __init__(self, slots: int, length: int):
        blocks = -(-length // PAGE)
        self._groups, self._size = pool_groups(slots, length)
        self._total = self._groups * self._size
        self._free = list(range(self._total))  # a heap: in as few groups as possible
        self._table = np.full((slots, blocks), self._total, np.int32)
        self._counts = np.zeros(slots, np.int32)  # of pages
        self._pages: Pages | None = None  # of JAX, until they change
        self._slots, self._blocks = np.zeros((2, self._total), np.int32)

    def free(self, slot: int) -> None:
        """Takes back all pages of a slot."""
        for page in self._table[slot, : self._counts[slot]].tolist():
            heapq.heappush(self._free, page)
        self._table[slot], self._counts[slot], self._pages = self._total, 0, None

    def extend(self, slot: int, length: int) -> list[int]:
        """Gives a slot the pages of that many tokens, and returns the new ones."""
        new = []
        for block in range(self._counts[slot], -(-length // PAGE)):
            self._table[slot, block] = page = heapq.heappop(self._free)
            self._slots[page], self._blocks[page] = slot, block
            new.append(page)
        self._counts[slot] += len(new)
        self._pages = None
        return new

    def resize(self, lengths: Int[np.ndarray, " slots"]) -> np.ndarray | None:
        """Extends slots, and frees those of length 0.

        Returns:
          the new pages, with others outside of the pool up to a multiple of all slots; None: there
          are no new ones.
        """
        new = []
        for slot in np.flatnonzero(-(-lengths // PAGE) != self._counts).tolist():
            if lengths[slot]:
                new += self.extend(slot, int(lengths[slot]))
            else:
                self.free(slot)
        padding = [self._total] * (-len(new) % len(self._table))
        return np.array([*new, *padding], np.int32) if new else None

    def pages(self) -> Pages:
        """For programs."""
        if self._pages is None:
            is_used = np.zeros(self._groups, bool)
            is_used[self._table[self._table < self._total] // self._size] = True
            arrays = self._table.copy(), self._slots.copy(), self._blocks.copy(), is_used
            self._pages = Pages(*map(jax.device_put, arrays))
        return self._pages


def empty_pool(config: ModelConfig, slots: int, length: int) -> Pool:
    """The pages of one layer, for sequences of at most `length` tokens."""
    groups, pages = pool_groups(slots, length)
    shape = (pages, config.kv_heads, PAGE, config.head_size)
    dtype = jnp.dtype(config.dtype)
    return tuple(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(groups))


def _put(pool: Pool, pages: Int[Array, " n"], at: tuple, keys: Any, values: Any) -> Pool:
    """The pool with keys and values at an index of some pages; those outside are left out."""
    written, count = [], len(pool[0].keys)
    for number, group in enumerate(pool):
        own = pages - number * count
        own = jnp.where(own < 0, count, own)  # out of bounds: not written
        put = (
            old.at[(own, *at)].set(jnp.asarray(new, old.dtype), mode="drop")
            for old, new in zip(group, (keys, values), strict=True)
        )
        written.append(KVCache(*put))
    return tuple(written)


def clear(pool: Pool, pages: Int[Array, " n"]) -> Pool:
    """The pool with zeros in pages: NaN of a sequence before spreads even from masked tokens."""
    return _put(pool, pages, (), 0, 0)


def write_segments(pool: Pool, segments: SegmentedCache, pages: Pages, row: Any) -> Pool:
    """The pool with the keys and values of sequence `row`, [1, K, S_i, H], in its pages."""

    def in_blocks(*parts):
        one = jnp.concatenate(parts, axis=2)[0]  # [K, S, H]
        return one.reshape(len(one), -1, PAGE, one.shape[-1]).swapaxes(0, 1)

    keys, values = (in_blocks(*parts) for parts in zip(*segments, strict=True))
    return _put(pool, pages.table[row], (), keys, values)


def write_tokens(
    pool: Pool,
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    positions: Int[Array, "B S"],
    pages: Pages,
) -> Pool:
    """The pool with each token's keys and values in the page of its position."""
    own = jnp.take_along_axis(pages.table, positions // PAGE, axis=1, mode="fill", fill_value=-1)
    own = jnp.where(own < 0, len(pages.rows), own)
    return _put(pool, own, (slice(None), positions % PAGE), keys, values)


def attend_to_pages(
    q: Float[Array, "B S N H"], pool: Pool, positions: Int[Array, "B S"], pages: Pages
) -> Float[Array, "B S N H"]:
    """Attention of tokens to the pages of their sequences, in which they are already written.

    A token attends to those up to its own position. The sums over each page are added in the order
    of the sequence, whichever pages it has, so that its result depends on no other sequence.
    """
    own, rows = queries_by_kv_head(q, positions, pool[0].keys.shape[1])
    shape = (len(pages.rows), *own.shape[1:3])
    sums = SoftmaxSums(
        jnp.zeros((*shape, 1)), jnp.ones((*shape, 1)), jnp.zeros((*shape, q.shape[-1]))
    )  # of each page

    def read(sums, keys, values, first):
        group = slice(first, first + len(keys))
        whose, blocks = pages.rows[group], pages.blocks[group]
        left = rows[whose] - blocks[:, None] * PAGE
        is_visible = (jnp.arange(PAGE) <= left[..., None])[:, None]
        part = attend_to_part(own[whose], KVCache(keys, values), is_visible, LEAST)
        return jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first, 0), sums, part
        )

    for number, (keys, values) in enumerate(pool):
        sums = jax.lax.cond(
            pages.is_used[number], functools.partial(read, first=number * len(keys)),
            lambda sums, *_: sums, sums, keys, values,
        )  # fmt: skip
    farthest = jnp.max(positions, axis=1, keepdims=True)
    is_reached = (jnp.arange(pages.table.shape[1]) * PAGE <= farthest)[..., None, None, None]

    def of_blocks(parts, otherwise):
        return jnp.where(is_reached, parts.at[pages.table].get(mode="clip"), otherwise)

    biggest, totals, out = map(of_blocks, sums, (LEAST, 0, 0))  # [B, blocks, K, Q, ...]
    shrink = jnp.exp(biggest - jnp.max(biggest, axis=1, keepdims=True))
    return by_token(jnp.sum(out * shrink, axis=1) / jnp.sum(totals * shrink, axis=1), q)
