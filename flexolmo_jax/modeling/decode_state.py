"""What decoding carries from token to token: keys and values, positions, the router's state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from flexolmo_jax.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, of all layers (stacked) or of one."""

    keys: jax.Array  # [L, B, K, S_max, H], or [B, K, S_max, H]
    values: jax.Array  # [L, B, K, S_max, H], or [B, K, S_max, H]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int, dtype) -> "KVCache":
        shape = (config.num_layers, batch, config.kv_heads, length, config.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def unstacked(self) -> "tuple[KVCache, ...]":
        """One cache for each layer."""
        return tuple(KVCache(*layer) for layer in zip(*self, strict=True))

    def write(
        self,
        keys: jax.Array,
        values: jax.Array,
        offset: jax.Array | int,
        layer_index: jax.Array | None,
    ) -> "KVCache":
        """The cache with keys and values [B, S, K, H] in the slots from `offset` on.

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

    def layer(self, layer_index: jax.Array | None) -> "KVCache":
        """The cache of one layer."""
        if layer_index is None:
            return self
        return KVCache(self.keys[layer_index], self.values[layer_index])


class DecodeState(NamedTuple):
    """What a forward pass over the next tokens of a text needs to know of the tokens before them.

    Attributes:
      cache: keys and values; stacked, or a tuple of one for each layer (inference/cpu_weights.py).
      offset: the cache slot of this call's first token.
      positions: int32 [B, S], of this call's tokens in their documents.
      visible: bool [B, S_max], the cache slots that the new token attends to (S = 1). None in the
        prefill: this call's tokens attend to each other.
      router_state: float32 [L, E, B], as in `router.add_decayed_logits`; None: no earlier tokens.
    """

    cache: KVCache | tuple[KVCache, ...]
    offset: jax.Array | int
    positions: jax.Array
    visible: jax.Array | None = None
    router_state: jax.Array | None = None
