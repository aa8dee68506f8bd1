"""OLMo 2 attention: QK-norm over the whole projected width, rotary positions, grouped queries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.layers import RMSNorm, Shared, normal, rotate


class KVCache(NamedTuple):
    """Keys and values of earlier tokens; stacked over layers outside of the scan."""

    keys: jax.Array  # [L, B, S_max, K, H]
    values: jax.Array  # [L, B, S_max, K, H]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int, dtype) -> "KVCache":
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Attention(nnx.Module):
    """Causal self-attention of one layer (its weights stacked over layers)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        c, (kq, kk, kv, ko) = config, jax.random.split(key, 4)
        layers = c.num_layers
        self.q = Shared(normal(kq, layers, c.width, c.num_heads, c.head_width))  # [L, D, N, H]
        self.k = Shared(normal(kk, layers, c.width, c.num_kv_heads, c.head_width))  # [L, D, K, H]
        self.v = Shared(normal(kv, layers, c.width, c.num_kv_heads, c.head_width))  # [L, D, K, H]
        self.o = Shared(normal(ko, layers, c.num_heads, c.head_width, c.width))  # [L, N, H, D]
        self.q_norm = RMSNorm(layers, c.num_heads, c.head_width)
        self.k_norm = RMSNorm(layers, c.num_kv_heads, c.head_width)

    @jax.named_scope("attention")
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        config: ModelConfig,
        cache: KVCache | None = None,
        at: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends.

        Args:
          x: [B, S, D], the raw residual stream (the norm sits on the output, in the layer).
          positions: int32 [B, S], the place of each token in its document.
          mask: bool [B, 1, S, S], or [B, 1, S, S_max] with a cache: who may look at whom.
          config: the model's sizes.
          cache: this layer's keys and values, [B, S_max, K, H] each.
          at: where in the cache this call's S tokens go.

        Returns:
          [B, S, D], and the cache with this call's keys and values written into it.
        """
        q = jnp.einsum("BSD,DNH->BSNH", x, self.q[...].astype(x.dtype))
        k = jnp.einsum("BSD,DKH->BSKH", x, self.k[...].astype(x.dtype))
        v = jnp.einsum("BSD,DKH->BSKH", x, self.v[...].astype(x.dtype))
        q = rotate(self.q_norm(q, config.norm_eps), positions, config.rope_theta)
        k = rotate(self.k_norm(k, config.norm_eps), positions, config.rope_theta)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k.astype(cache.keys.dtype), at, 1)
            v = jax.lax.dynamic_update_slice_in_dim(
                cache.values, v.astype(cache.values.dtype), at, 1
            )
            cache = KVCache(k, v)
        out = jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask)
        return jnp.einsum("BSNH,NHD->BSD", out, self.o[...].astype(x.dtype)), cache


def segment_positions(segments: jax.Array) -> jax.Array:
    """Position of each token inside its own document: int32 [B, S] -> int32 [B, S]."""
    index = jnp.arange(segments.shape[1])
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def segment_mask(segments: jax.Array) -> jax.Array:
    """Causal attention that never crosses documents: int32 [B, S] -> bool [B, 1, S, S].

    Padding (segment 0) attends to padding only, so no row of the softmax is empty.
    """
    index = jnp.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return (same & (index[:, None] >= index[None, :]))[:, None]
