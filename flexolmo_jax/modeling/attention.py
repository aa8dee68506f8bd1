"""OLMo 2 attention: QK-norm over the whole projected width, rotary positions, grouped queries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.attend import self_attention
from flexolmo_jax.modeling.layers import RMSNorm, Shared, normal, rotate


class KVCache(NamedTuple):
    """Keys and values of earlier tokens; stacked over layers outside of the scan."""

    keys: jax.Array  # [L, B, S_max, K, H]
    values: jax.Array  # [L, B, S_max, K, H]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int, dtype) -> "KVCache":
        shape = (config.num_layers, batch, length, config.kv_heads, config.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Attention(nnx.Module):
    """Causal self-attention of one layer (its weights stacked over layers)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        c, (kq, kk, kv, ko) = config, jax.random.split(key, 4)
        layers = c.num_layers
        self.q = Shared(normal(kq, layers, c.width, c.num_heads, c.head_size))  # [L, D, N, H]
        self.k = Shared(normal(kk, layers, c.width, c.kv_heads, c.head_size))  # [L, D, K, H]
        self.v = Shared(normal(kv, layers, c.width, c.kv_heads, c.head_size))  # [L, D, K, H]
        self.o = Shared(normal(ko, layers, c.num_heads, c.head_size, c.width))  # [L, N, H, D]
        self.q_norm = RMSNorm(layers, c.num_heads, c.head_size)
        self.k_norm = RMSNorm(layers, c.kv_heads, c.head_size)

    @jax.named_scope("attention")
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        config: ModelConfig,
        cache: KVCache | None = None,
        at: jax.Array | int = 0,
        visible: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends.

        Args:
          x: [B, S, D], the raw residual stream (the norm sits on the output, in the layer).
          positions: int32 [B, S], the place of each token in its document.
          segments: int32 [B, S], the document of each token; 0 is padding.
          config: the model's sizes.
          cache: this layer's keys and values, [B, S_max, K, H] each.
          at: where in the cache this call's S tokens go.
          visible: bool [B, S_max]: what in the cache the token may look at (S = 1). Without it,
            this call's tokens look at each other only, even if there is a cache to fill.

        Returns:
          [B, S, D], and the cache with this call's keys and values written into it.
        """
        q = jnp.einsum("BSD,DNH->BSNH", x, self.q[...].astype(x.dtype))
        k = jnp.einsum("BSD,DKH->BSKH", x, self.k[...].astype(x.dtype))
        v = jnp.einsum("BSD,DKH->BSKH", x, self.v[...].astype(x.dtype))
        q = rotate(self.q_norm(q, config.norm_eps), positions, config.rope_theta)
        k = rotate(self.k_norm(k, config.norm_eps), positions, config.rope_theta)
        if cache is not None:
            new = zip(cache, (k, v), strict=True)
            cache = KVCache(
                *(jax.lax.dynamic_update_slice_in_dim(c, n.astype(c.dtype), at, 1) for c, n in new)
            )
        if visible is None:
            out = self_attention(q, k, v, segments, config.attention)
        else:
            assert cache is not None
            keys, values = (c.astype(q.dtype) for c in cache)
            out = jax.nn.dot_product_attention(q, keys, values, mask=visible[:, None, None])
        return jnp.einsum("BSNH,NHD->BSD", out, self.o[...].astype(x.dtype)), cache


def segment_positions(segments: jax.Array) -> jax.Array:
    """Position of each token inside its own document: int32 [B, S] -> int32 [B, S]."""
    index = jnp.arange(segments.shape[1])
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
