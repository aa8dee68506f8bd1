"""What is known of the tokens that a batch of sequences has read, on a CPU."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.inference.paged_attention import (
    Pages,
    PageTable,
    Pool,
    clear,
    empty_pool,
    write_segments,
)
from flexolmo_jax.modeling.decode_state import (
    EvidenceState,
    SegmentedCache,
    empty_segments,
    segment_lengths,
)


class Tokens(NamedTuple):
    """The next tokens of sequences of a batch; arrays are of NumPy or JAX.

    Attributes:
      ids: int32 [B, S].
      start: int32 [B], the position of the first.
      lengths: int32 [B], how many there are; the rest is padding. 0: the row is not in use.
      allowed: bool [B, E], experts.
    """

    ids: Any
    start: Any
    lengths: Any
    allowed: Any

    @property
    def last(self) -> Any:
        """int32 [B], the index of the last token; 0 where the row is not in use."""
        return self.lengths.clip(1) - 1


class Sequences(NamedTuple):
    """What is known of the tokens of each sequence; donated to calls.

    The cache of one sequence is in segments; several share a pool of pages.

    Attributes:
      caches: keys and values, of each layer.
      router_states: with `config.memory`, of each layer; float32.
      evidence: with `config.evidence`.
      table: of the pages, if there are several sequences.
    """

    caches: tuple[SegmentedCache | Pool, ...]
    router_states: tuple[Float[Array, "E B"], ...] | None
    evidence: EvidenceState | None
    table: PageTable | None

    @classmethod
    def empty(cls, config: ModelConfig, experts: int, batch: int, length: int) -> "Sequences":
        """Of no tokens, with room for `length`; one program makes those of similar lengths."""
        length = sum(segment_lengths(length))
        table = PageTable(batch, length) if batch > 1 else None
        caches, router_states, evidence = _empty(config, experts, batch, length)
        return cls(caches, router_states, evidence, table)

    def place(self, one: "Sequences", row: int, length: int) -> "Sequences":
        """These, which are donated, with sequence `row` replaced by `one`, of `length` tokens."""
        assert self.table is not None
        self.table.free(row)
        self.table.extend(row, length)
        pages, index = self.table.pages(), np.int32(row)
        pairs = zip(self.caches, one.caches, strict=True)
        caches = tuple(_write_segments(*pair, pages, index) for pair in pairs)
        states = (self.router_states, self.evidence), (one.router_states, one.evidence)
        router_states, evidence = _replace_state(*states, index)
        return Sequences(caches, router_states, evidence, self.table)

    def with_pages(self, tokens: Tokens) -> "tuple[Sequences, Pages | None]":
        """These, which are donated, with pages for their next tokens; those without lose theirs."""
        if self.table is None:
            return self, None
        new = self.table.resize((tokens.start + tokens.lengths) * (tokens.lengths > 0))
        sequences = self
        if new is not None:
            sequences = self._replace(caches=tuple(_clear(pool, new) for pool in self.caches))
        return sequences, self.table.pages()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(config: ModelConfig, experts: int, batch: int, length: int) -> tuple:
    layers = range(config.num_layers)

    def cache():
        if batch == 1:
            return empty_segments(config, length)
        return empty_pool(config, batch, length)

    return (
        tuple(cache() for _ in layers),
        tuple(jnp.zeros((experts, batch)) for _ in layers) if config.memory else None,
        EvidenceState.empty(experts, batch) if config.evidence else None,
    )


@functools.partial(jax.jit, donate_argnums=0)
def _replace_state(states: Any, one: Any, row: Any) -> Any:
    """The states with that of one sequence replaced; the axis of sequences is the last."""
    return jax.tree.map(lambda old, new: old.at[..., row].set(new[..., 0]), states, one)


_clear = jax.jit(clear, donate_argnums=0)
_write_segments = jax.jit(write_segments, donate_argnums=0)
