"""OLMo 2 attention: QK-norm over the whole projected width, rotary positions, grouped queries."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.decode_state import DecodeState, KVCache, SegmentedCache
from flexolmo_jax.modeling.kernels.flash_attention import self_attention
from flexolmo_jax.modeling.kernels.quantized import dot
from flexolmo_jax.modeling.layers import RMSNorm, Shared, normal, rotate
from flexolmo_jax.parallel import collectives

LEAST = -1e30  # below each score, and finite: what sees nothing is 0, and not NaN


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
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        config: ModelConfig,
        state: DecodeState | None = None,
        layer_index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Attends.

        Args:
          x: the raw residual stream (OLMo 2 normalizes the output, in the layer).
          positions: of each token in its document.
          segments: the document of each token; 0 is padding.
          config: the model's sizes.
          state: in decoding, with the cache of this layer, or the stacked one of all layers.
          layer_index: of this layer in a stacked cache.

        Returns:
          the output, and the cache with this call's keys and values written into it.
        """
        q, k, v = self.project(x, positions, config)
        if state is None:
            return self.output(self_attention(q, k, v, segments, config.attention)), None
        if state.offset is None:
            assert layer_index is not None  # of a stacked cache
            cache = state.cache.write_at(k, v, positions, layer_index)
            out = attend_to_segments(q, (cache.layer(layer_index),), positions)
        else:
            cache = state.cache.write(k, v, state.offset, layer_index)
            if state.visible is None:
                out = self_attention(q, k, v, segments, config.attention)
            else:
                out = _attend_to_cache(q, cache.layer(layer_index), state.visible)
        return self.output(out), cache

    def project(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], config: ModelConfig
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Queries, keys and values; queries and keys normed and rotated to their positions."""
        c = config
        x = collectives.copy_to_tensor_parallel(x)
        q = _heads(x, self.q[...], c.num_heads, c.head_size)
        k = _heads(x, self.k[...], c.kv_heads, c.head_size)
        v = _heads(x, self.v[...], c.kv_heads, c.head_size)
        q = rotate(self.q_norm(q, c.norm_eps), positions, c.rope_theta)
        k = rotate(self.k_norm(k, c.norm_eps), positions, c.rope_theta)
        return q, k, v

    def output(self, out: Float[Array, "B S N H"]) -> Float[Array, "B S D"]:
        """The output projection."""
        o = self.o[...]
        if o.ndim == 2:
            return dot(out.reshape(*out.shape[:2], -1), o)
        out = jnp.einsum("BSNH,NHD->BSD", out, o.astype(out.dtype))
        return collectives.reduce_from_tensor_parallel(out)


def _heads(x: jax.Array, weight: jax.Array, heads: int, head_size: int) -> jax.Array:
    """[B, S, D] @ [D, heads, H], or @ [D, heads * H] in decoding -> [B, S, heads, H]."""
    if weight.ndim == 2:
        return dot(x, weight).reshape(*x.shape[:2], heads, head_size)
    return jnp.einsum("BSD,DNH->BSNH", x, weight.astype(x.dtype))


def _attend_to_cache(
    q: Float[Array, "B 1 N H"], cache: KVCache, visible: Bool[Array, "B S_max"]
) -> Float[Array, "B 1 N H"]:
    """Attention of one new token to the cache of its layer, [B, K, S_max, H]."""
    keys, values = (x.astype(q.dtype) for x in cache)
    batch, _, heads, width = q.shape
    q = q.reshape(batch, keys.shape[1], -1, width)  # [B, K, N / K, H]
    q = q * width**-0.5
    scores = jnp.einsum("BKGH,BKSH->BKGS", q, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, LEAST))
    out = jnp.einsum("BKGS,BKSH->BKGH", weights.astype(q.dtype), values)
    return out.reshape(batch, 1, heads, width)


def attend_to_segments(
    q: Float[Array, "B S N H"], cache: SegmentedCache, positions: Int[Array, "B S"]
) -> Float[Array, "B S N H"]:
    """Attention of tokens to a cache in segments, in which they are already written.

    A token attends to the slots up to its own position. Segments that no token reaches are not
    read; one that another sequence reaches adds exactly 0, so that the result of a sequence depends
    on no other.
    """
    own, rows = queries_by_kv_head(q, positions, cache[0].keys.shape[1])
    farthest = jnp.max(positions)

    def add(sums, keys, values, first):
        biggest, total, out = sums
        slots = first + jnp.arange(keys.shape[2])
        is_visible = slots <= rows[:, None, :, None]
        part = attend_to_part(own, KVCache(keys, values), is_visible, biggest)
        shrink = jnp.exp(biggest - part.biggest)
        return SoftmaxSums(part.biggest, total * shrink + part.total, out * shrink + part.out)

    shape, first = own.shape[:-1], 0
    sums = SoftmaxSums(jnp.full((*shape, 1), LEAST), jnp.zeros((*shape, 1)), jnp.zeros(own.shape))
    for keys, values in cache:
        if first == 0:  # every token reaches its own slot or an earlier one
            sums = add(sums, keys, values, 0)
        else:
            sums = jax.lax.cond(
                farthest >= first, functools.partial(add, first=first), lambda sums, *_: sums,
                sums, keys, values,
            )  # fmt: skip
        first += keys.shape[2]
    return by_token(sums.out / sums.total, q)


class SoftmaxSums(NamedTuple):
    """Attention to a part of the keys, which can be added to that to others; float32.

    Attributes:
      biggest: the largest score, or a larger number.
      total: the sum of the scores' exponentials, over that of `biggest`.
      out: the sum of the values, with these as weights.
    """

    biggest: Float[Array, "B K Q 1"]
    total: Float[Array, "B K Q 1"]
    out: Float[Array, "B K Q H"]


def attend_to_part(
    q: Float[Array, "B K Q H"],
    part: KVCache,
    is_visible: Bool[Array, "#B 1 Q S"],
    least: Float[Array, "B K Q 1"] | float,
) -> SoftmaxSums:
    """Attention of queries of `queries_by_kv_head` to keys and values; `least` bounds `biggest`."""
    keys, values = (x.astype(q.dtype) for x in part)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(is_visible, scores, -jnp.inf)
    biggest = jnp.maximum(least, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - biggest)
    out = jnp.einsum(
        "BKQS,BKSH->BKQH", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
    )
    return SoftmaxSums(biggest, jnp.sum(weights, axis=-1, keepdims=True), out)


def queries_by_kv_head(
    q: Float[Array, "B S N H"], positions: Int[Array, "B S"], kv_heads: int
) -> tuple[Float[Array, "B K Q H"], Int[Array, "B Q"]]:
    """Scaled queries, Q = N / K * S for each of K key heads, and the positions of their tokens."""
    batch, length, heads, width = q.shape
    q = (q * width**-0.5).reshape(batch, length, kv_heads, -1, width)
    q = jnp.moveaxis(q, 1, 3).reshape(batch, kv_heads, -1, width)
    return q, jnp.tile(positions, (1, heads // kv_heads))


def by_token(out: Float[Array, "B K Q H"], like: Float[Array, "B S N H"]) -> Array:
    """What `queries_by_kv_head` made of `like`, in its shape and dtype again."""
    batch, length, heads, width = like.shape
    out = out.astype(like.dtype).reshape(batch, out.shape[1], -1, length, width)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width)


def segment_positions(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The position of each token inside its own document."""
    index = jnp.arange(segments.shape[1])
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
