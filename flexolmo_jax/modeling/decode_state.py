"""What decoding carries from token to token: keys and values, positions, the router's state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, of all layers (stacked) or of one."""

    keys: Float[Array, "*L B K S_max H"]
    values: Float[Array, "*L B K S_max H"]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int, dtype) -> "KVCache":
        shape = (config.num_layers, batch, config.kv_heads, length, config.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(
        self,
        keys: Float[Array, "B S K H"],
        values: Float[Array, "B S K H"],
        offset: Int[Array, ""] | int,
        layer_index: Int[Array, ""] | None,
    ) -> "KVCache":
        """The cache with new keys and values in the slots from `offset` on.

        `layer_index` selects the slice of a stacked cache; only it is updated, so that the carry of
        a scan over layers is updated in place.
        """

        def put(old, new):
            new = new.swapaxes(1, 2).astype(old.dtype)
            if layer_index is None:
                return jax.lax.dynamic_update_slice_in_dim(old, new, offset, 2)
            # Without the constraint XLA for TPU lays out the whole cache as suits the new rows, and
            # copies it on the way in and out, which takes twice the memory.
            new = with_layout_constraint(new[None], Layout(tuple(range(old.ndim))))
            return jax.lax.dynamic_update_slice(old, new, (layer_index, 0, 0, offset, 0))

        return KVCache(put(self.keys, keys), put(self.values, values))

    def write_at(
        self,
        keys: Float[Array, "B S K H"],
        values: Float[Array, "B S K H"],
        positions: Int[Array, "B S"],
        layer_index: Int[Array, ""],
    ) -> "KVCache":
        """The stacked cache with each token's keys and values in the slot of its position."""
        rows = jnp.arange(len(positions))[:, None]

        def put(old, new):
            return old.at[layer_index, rows, :, positions].set(new.astype(old.dtype), mode="drop")

        return KVCache(put(self.keys, keys), put(self.values, values))

    def layer(self, layer_index: Int[Array, ""] | None) -> "KVCache":
        """The cache of one layer."""
        if layer_index is None:
            return self
        return KVCache(self.keys[layer_index], self.values[layer_index])


SEGMENT = 128  # slots of the shortest segments
SegmentedCache = tuple[KVCache, ...]  # of one layer; each [B, K, S_i, H], one after the other


def segment_lengths(length: int) -> tuple[int, ...]:
    """Segments of a cache with at least `length` slots: four of 128, then two of each power of two.

    Attention reads whole segments, and each that any sequence has reached. Lengths that grow keep
    down both the slots that are read in vain and the number of shapes to compile for.
    """
    segments = [SEGMENT]
    while sum(segments) < length:
        segments.append(max(SEGMENT, 1 << (sum(segments).bit_length() - 2)))
    return tuple(segments)


def empty_segments(config: ModelConfig, length: int) -> SegmentedCache:
    """The cache of one layer for one sequence, with at least `length` slots."""
    shapes = [(1, config.kv_heads, s, config.head_size) for s in segment_lengths(length)]
    return tuple(KVCache(*(jnp.zeros(s, jnp.dtype(config.dtype)) for _ in "kv")) for s in shapes)


def write_to_segments(
    cache: SegmentedCache,
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    positions: Int[Array, "B S"],
) -> SegmentedCache:
    """The cache with each token's keys and values in the slot of its position.

    Only segments with such a slot are written. XLA writes in place inside a conditional; without
    one it writes once for the attention and once for the next call, and copies segments for it.
    """
    rows, written, first = jnp.arange(len(positions))[:, None], [], 0

    def put(segment, slots):
        return KVCache(
            *(
                old.at[rows, :, slots].set(new.astype(old.dtype), mode="drop")
                for old, new in zip(segment, (keys, values), strict=True)
            )
        )

    for segment in cache:
        length = segment.keys.shape[2]
        slots = positions - first
        is_own = (slots >= 0) & (slots < length)
        slots = jnp.where(is_own, slots, length)  # out of bounds: not written
        written.append(jax.lax.cond(jnp.any(is_own), put, lambda old, _: old, segment, slots))
        first += length
    return tuple(written)


class EvidenceState(NamedTuple):
    """What evidence routing (evidence.py) knows of the tokens before.

    Attributes:
      sums: float32, the decayed sums of each expert's log-likelihood ratios.
      last_tokens: -1 where there is none.
    """

    sums: Float[Array, "E B"]
    last_tokens: Int[Array, " B"]

    @classmethod
    def empty(cls, num_experts: int, batch: int) -> "EvidenceState":
        """Of no tokens."""
        return cls(jnp.zeros((num_experts, batch)), jnp.full((batch,), -1, jnp.int32))


class DecodeState(NamedTuple):
    """What a forward pass over the next tokens of a text needs to know of the tokens before them.

    Attributes:
      cache: keys and values, stacked over the layers.
      offset: the cache slot of this call's first token; None: each token goes to the slot of its
        position, and attends to those up to it.
      positions: of this call's tokens in their documents.
      visible: the cache slots that the new token attends to (S = 1). None in the
        prefill: this call's tokens attend to each other.
      router_state: float32, as in `router.add_decayed_logits`; None: no earlier tokens.
      evidence: with `config.evidence`; None: no earlier tokens.
      lengths: how many of this call's tokens the router's memory and the evidence know afterwards;
        what comes after them is padding. None: all.
    """

    cache: KVCache
    offset: Int[Array, ""] | int | None
    positions: Int[Array, "B S"]
    visible: Bool[Array, "B S_max"] | None = None
    router_state: Float[Array, "*L E B"] | None = None
    evidence: EvidenceState | None = None
    lengths: Int[Array, " B"] | None = None
