"""Attention itself, and the one place that says which implementation computes it.

`blocked` runs everywhere and never holds the scores of more than one block of queries of one head;
`splash` is the TPU kernel and `cudnn` the GPU kernel that come with JAX.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from flexolmo_jax import sharding

BLOCKS = 8  # of queries; a block looks at the keys up to its own end only
SMALLEST_BLOCK = 64
SPLASH_BLOCK = 512  # at most; the kernel's default, 128, reads keys and values four times as often
LONG = 1024  # tokens; longer sequences are a loop over blocks


def self_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, implementation: str
) -> jax.Array:
    """Causal attention of a sequence to itself that never crosses documents.

    Padding (segment 0) attends to padding only, so no row of the softmax is empty.

    Args:
      q: [B, S, N, H].
      k, v: [B, S, K, H]; K divides N.
      segments: int32 [B, S], the document of each token.
      implementation: "blocked", "splash" or "cudnn"; "auto" takes the one made for the default
        backend and dtype.

    Returns:
      [B, S, N, H].

    Raises:
      ValueError: the implementation cannot compute these shapes or dtypes.
    """
    if implementation == "auto":
        implementation = _made_for(sharding.platform(), q)
    if implementation == "splash":
        return _splash(q, k, v, segments)
    if implementation == "cudnn":
        index = jnp.arange(q.shape[1])
        same = segments[:, :, None] == segments[:, None, :]
        mask = (same & (index[:, None] >= index))[:, None]  # of all heads at once
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return _blocked(q, k, v, segments)


def _made_for(backend: str, q: jax.Array) -> str:
    _, length, _, head = q.shape
    if backend == "tpu" and length % 128 == 0 and head % 128 == 0:
        return "splash"
    if backend == "gpu" and q.dtype == jnp.bfloat16:  # it has no float32
        return "cudnn"
    return "blocked"


def _splash(q, k, v, segments):
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, length, heads, head = q.shape
    if length % 128 or head % 128:
        raise ValueError(
            f"splash attention needs a length and a head width in multiples of 128, found "
            f"{length} and {head}; take attention='blocked'"
        )
    mask = splash_attention.CausalMask((length, length))
    block = math.gcd(length, SPLASH_BLOCK)
    sizes = {field.name: block for field in dataclasses.fields(splash_attention.BlockSizes)
             if field.name.startswith("block_")}  # fmt: skip
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=sharding.platform() == "cpu",  # slow, but the same kernel: for tests
    )
    repeat = heads // k.shape[2]
    q, k, v = (x.swapaxes(1, 2) for x in (q * head**-0.5, k, v))
    k, v = (jnp.repeat(x, repeat, axis=1) for x in (k, v))
    ids = splash_attention.SegmentIds(segments, segments)
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)


# Flash attention (Dao 2023) in plain JAX. One key/value head at a time, with the G = N / K query
# heads that share it: the scores of a block fit into a cache, and what is kept for the backward
# pass does not grow with S^2.


@jax.custom_vjp
def _blocked(q, k, v, segments):
    return _blocked_forward(q, k, v, segments)[0]


def _blocked_forward(q, k, v, segments):
    heads = _by_head(q, k, v, segments)
    out, log_total = jax.lax.map(_forward_one, heads)
    return _from_heads(out, q.shape), (q, k, v, segments, out, log_total)


def _blocked_backward(kept, d_out):
    q, k, v, segments, out, log_total = kept
    d_out = _queries_by_head(d_out, k.shape[2])
    heads = (*_by_head(q, k, v, segments), out, log_total, d_out)
    dq, dk, dv = jax.lax.map(_backward_one, heads)
    dk, dv = (_from_heads(x[:, None], k.shape) for x in (dk, dv))
    return _from_heads(dq, q.shape), dk, dv, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _forward_one(one):
    q, k, v, segments = one  # [G, S, H], [S, H], [S, H], [S]

    def block(start, q, seen):
        scores = _scores(q, k[:seen], segments, start)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _dot("gst,th->gsh", weights.astype(v.dtype), v[:seen]) / total
        return (out.astype(q.dtype), top + jnp.log(total)), ()

    return _over_blocks(block, (q,))[0]


def _backward_one(one):
    q, k, v, segments, out, log_total, d_out = one
    scale = q.shape[-1] ** -0.5
    inner = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1, keepdims=True)

    def block(start, q, log_total, inner, d_out, seen):
        weights = jnp.exp(_scores(q, k[:seen], segments, start) - log_total)
        dv = _dot("gst,gsh->th", weights.astype(d_out.dtype), d_out)
        d_weights = _dot("gsh,th->gst", d_out, v[:seen])
        d_scores = (weights * (d_weights - inner)).astype(q.dtype)
        dq = _dot("gst,th->gsh", d_scores, k[:seen]) * scale
        dk = _dot("gst,gsh->th", d_scores, q) * scale
        return (dq.astype(q.dtype),), (dk, dv)

    (dq,), (dk, dv) = _over_blocks(block, (q, log_total, inner, d_out))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _over_blocks(block, rows: tuple) -> tuple[tuple, tuple]:
    """Runs `block(start, *rows of the block, seen)` for all blocks of queries.

    A short sequence is unrolled: each block reads the keys up to its own end, at static shapes. A
    long one is a loop, where each block reads all keys, so that one block's scores are all there
    is in memory: the unrolled program would hold those of all blocks.

    Args:
      block: returns rows [G, block, ...], and addends over the first `seen` keys [seen, ...].
      rows: arrays [G, S, ...] that are cut into blocks.

    Returns:
      the rows of all blocks [G, S, ...], and the sums of the addends [S, ...].
    """
    length = rows[0].shape[1]
    if length > LONG and length % SMALLEST_BLOCK == 0:
        return _looped(block, rows)
    size = max(SMALLEST_BLOCK, -(-length // (BLOCKS * SMALLEST_BLOCK)) * SMALLEST_BLOCK)
    outs, totals = [], None
    for start in range(0, length, size):
        seen = min(start + size, length)
        out, addends = block(start, *(x[:, start:seen] for x in rows), seen=seen)
        outs.append(out)
        totals = totals or tuple(jnp.zeros((length, *x.shape[1:]), x.dtype) for x in addends)
        totals = tuple(t.at[:seen].add(x) for t, x in zip(totals, addends, strict=True))
    return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*outs, strict=True)), totals or ()


def _looped(block, rows: tuple) -> tuple[tuple, tuple]:
    length = rows[0].shape[1]
    size = max(n for n in (64, 128, 256, 512) if length % n == 0)

    def split(x):  # [G, S, ...] -> [blocks, G, size, ...]
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(x.shape[1], length, *x.shape[3:])

    def step(totals, one):
        start, parts = one
        out, addends = block(start, *parts, seen=length)
        return jax.tree.map(jnp.add, totals, addends), out

    parts = tuple(split(x) for x in rows)
    like = jax.eval_shape(lambda: block(0, *(x[0] for x in parts), seen=length)[1])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    totals, outs = jax.lax.scan(step, zeros, (jnp.arange(0, length, size), parts))
    return tuple(join(x) for x in outs), totals


def _scores(q, k, segments, start):
    """float32 [G, block, keys]: scaled scores, very small where looking is not allowed."""
    scores = _dot("gsh,th->gst", q * q.shape[-1] ** -0.5, k)
    size, keys = scores.shape[1:]
    own = jax.lax.dynamic_slice_in_dim(segments, start, size)
    causal = (start + jnp.arange(size))[:, None] >= jnp.arange(keys)
    allowed = causal & (own[:, None] == segments[:keys])
    return jnp.where(allowed, scores, -1e30)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_head(q, k, v, segments):
    kv_heads = k.shape[2]
    k, v = (x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (k, v))  # [B*K, S, H]
    return _queries_by_head(q, kv_heads), k, v, jnp.repeat(segments, kv_heads, axis=0)


def _queries_by_head(q, kv_heads: int):
    batch, length, heads, width = q.shape
    q = q.swapaxes(1, 2).reshape(batch * kv_heads, heads // kv_heads, length, width)
    return q  # [B*K, G, S, H]


def _from_heads(x, shape):
    batch, length, heads, width = shape
    return x.reshape(batch, heads, length, width).swapaxes(1, 2)
