"""Self-attention, and the choice of the implementation that computes it.

`blocked` is plain JAX, runs everywhere, and holds the scores of one block of queries of a few heads
at a time; `splash` is the TPU kernel and `cudnn` the GPU kernel that come with JAX.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexolmo_jax.parallel import collectives

MAX_UNROLLED_BLOCKS = 8  # query blocks; each reads the keys up to its own end only
MIN_BLOCK = 64
MAX_SPLASH_BLOCK = 512  # the kernel's default of 128 reads keys and values four times as often
MAX_SCORES_BYTES = 4 * 2**20  # of one block's scores, of all heads that are computed at a time
MAX_UNROLLED_LENGTH = 1024  # tokens; longer sequences loop over blocks


def self_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: Int[Array, "B S"],
    implementation: str,
) -> Float[Array, "B S N H"]:
    """Causal self-attention within documents.

    Padding (segment 0) attends to padding only, so no row of the softmax is empty.

    Args:
      q, k, v: queries, keys and values; K divides N.
      segments: the document of each token.
      implementation: "blocked", "splash" or "cudnn"; "auto" chooses by backend,
        shape and dtype.

    Raises:
      ValueError: the implementation cannot compute these shapes or dtypes.
    """
    if implementation == "auto":
        implementation = _choose(collectives.platform(), q)
    if implementation == "splash":
        return _splash(q, k, v, segments)
    if implementation == "cudnn":
        index = jnp.arange(q.shape[1])
        same = segments[:, :, None] == segments[:, None, :]
        mask = (same & (index[:, None] >= index))[:, None]  # broadcast over heads
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return _blocked(q, k, v, segments)


def _choose(backend: str, q: jax.Array) -> str:
    _, length, _, head = q.shape
    if backend == "tpu" and length % 128 == 0 and head % 128 == 0:
        return "splash"
    if backend == "gpu" and q.dtype == jnp.bfloat16:  # cuDNN has no float32 attention
        return "cudnn"
    return "blocked"


def _splash(q, k, v, segments):
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, length, heads, head = q.shape
    if length % 128 or head % 128:
        raise ValueError(
            f"splash attention needs a length and a head width in multiples of 128, found "
            f"{length} and {head}; use attention='blocked'"
        )
    mask = splash_attention.CausalMask((length, length))
    block = math.gcd(length, MAX_SPLASH_BLOCK)
    names = [field.name for field in dataclasses.fields(splash_attention.BlockSizes)]
    sizes = {name: block for name in names if name.startswith("block_")}
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=collectives.platform() == "cpu",  # slow; tests run the kernel this way
    )
    repeat = heads // k.shape[2]
    q, k, v = (x.swapaxes(1, 2) for x in (q * head**-0.5, k, v))
    k, v = (jnp.repeat(x, repeat, axis=1) for x in (k, v))
    ids = splash_attention.SegmentIds(segments, segments)
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)


# FlashAttention-2 (Dao, 2023) in plain JAX. It computes a few key/value heads at a time, each with
# the G = N / K query heads that share it: the scores of a block fit into the processor's cache, and
# the residuals of the backward pass do not grow with S^2.


@jax.custom_vjp
def _blocked(q, k, v, segments):
    return _blocked_forward(q, k, v, segments)[0]


def _blocked_forward(q, k, v, segments):
    out, log_total = _over_heads(_forward_heads, _by_head(q, k, v, segments))
    return _from_heads(out, q.shape), (q, k, v, segments, out, log_total)


def _blocked_backward(residuals, d_out):
    q, k, v, segments, out, log_total = residuals
    d_out = _queries_by_head(d_out, k.shape[2])
    heads = (*_by_head(q, k, v, segments), out, log_total, d_out)
    dq, dk, dv = _over_heads(_backward_heads, heads)
    dk, dv = (_from_heads(x, k.shape) for x in (dk, dv))
    return _from_heads(dq, q.shape), dk, dv, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _over_heads(compute, arrays: tuple) -> tuple:
    """Runs `compute(*arrays)` for P heads at a time, the most whose scores are small enough.

    Args:
      compute: takes and returns arrays [P, ...].
      arrays: [B * K, ...]; the first are the queries [B * K, G, S, H].
    """
    count, group, length, _ = arrays[0].shape
    scores_bytes = 4 * group * _block_size(length) * length  # of one head
    most = max(1, MAX_SCORES_BYTES // scores_bytes)
    at_once = max(n for n in range(1, count + 1) if count % n == 0 and n <= most)
    if at_once == count:
        return compute(*arrays)
    arrays = tuple(x.reshape(-1, at_once, *x.shape[1:]) for x in arrays)
    outs = jax.lax.map(lambda arrays: compute(*arrays), arrays)
    return tuple(x.reshape(count, *x.shape[2:]) for x in outs)


def _forward_heads(q, k, v, segments):  # [P, G, S, H], [P, S, H], [P, S, H], [P, S]
    def block(start, size, q, seen):
        scores = _scores(q, k[:, :seen], segments, start, size)
        max_score = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - max_score)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _dot("prt,pth->prh", weights.astype(v.dtype), v[:, :seen]) / total
        return (out.astype(q.dtype), max_score + jnp.log(total)), ()

    return _over_blocks(block, (q,))[0]


def _backward_heads(q, k, v, segments, out, log_total, d_out):
    scale = q.shape[-1] ** -0.5
    inner = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1, keepdims=True)

    def block(start, size, q, log_total, inner, d_out, seen):
        weights = jnp.exp(_scores(q, k[:, :seen], segments, start, size) - log_total)
        dv = _dot("prt,prh->pth", weights.astype(d_out.dtype), d_out)
        d_weights = _dot("prh,pth->prt", d_out, v[:, :seen])
        d_scores = (weights * (d_weights - inner)).astype(q.dtype)
        dq = _dot("prt,pth->prh", d_scores, k[:, :seen]) * scale
        dk = _dot("prt,prh->pth", d_scores, q) * scale
        return (dq.astype(q.dtype),), (dk, dv)

    (dq,), (dk, dv) = _over_blocks(block, (q, log_total, inner, d_out))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _over_blocks(block, rows: tuple) -> tuple[tuple, tuple]:
    """Runs `block(start, size, *rows of the block, seen)` for all blocks of queries.

    The blocks of a short sequence are unrolled: each reads the keys up to its own end, at static
    shapes. Those of a long sequence are a loop, in which each block reads all keys, so that memory
    holds the scores of one block: the unrolled program would hold those of all blocks.

    Args:
      block: takes rows [P, R, ...], the G * block queries of a head; returns such rows, and addends
        over the first `seen` keys [P, seen, ...].
      rows: arrays [P, G, S, ...] that are split into blocks.

    Returns:
      the rows of all blocks [P, G, S, ...], and the sums of the addends [P, S, ...].
    """
    heads, group, length, _ = rows[0].shape
    size = _block_size(length)

    def flat(start, *parts, seen):
        """`block` of rows [P, G, block, ...]; XLA's matmuls are faster without the extra axis."""
        queries = parts[0].shape[2]
        parts = tuple(x.reshape(heads, -1, x.shape[-1]) for x in parts)
        outs, addends = block(start, queries, *parts, seen=seen)
        return tuple(x.reshape(heads, group, -1, x.shape[-1]) for x in outs), addends

    if _is_long(length):
        return _looped(flat, rows, size)
    outs, totals = [], None
    for start in range(0, length, size):
        seen = min(start + size, length)
        out, addends = flat(start, *(x[:, :, start:seen] for x in rows), seen=seen)
        outs.append(out)
        totals = totals or tuple(jnp.zeros((heads, length, x.shape[-1]), x.dtype) for x in addends)
        totals = tuple(t.at[:, :seen].add(x) for t, x in zip(totals, addends, strict=True))
    return tuple(jnp.concatenate(parts, axis=2) for parts in zip(*outs, strict=True)), totals or ()


def _is_long(length: int) -> bool:
    return length > MAX_UNROLLED_LENGTH and length % MIN_BLOCK == 0


def _block_size(length: int) -> int:
    if _is_long(length):
        return max(n for n in (64, 128, 256, 512) if length % n == 0)
    return max(MIN_BLOCK, -(-length // (MAX_UNROLLED_BLOCKS * MIN_BLOCK)) * MIN_BLOCK)


def _looped(block, rows: tuple, size: int) -> tuple[tuple, tuple]:
    heads, _, length = rows[0].shape[:3]

    def split(x):  # [P, G, S, ...] -> [blocks, P, G, size, ...]
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 2).reshape(heads, x.shape[2], length, *x.shape[4:])

    def step(totals, inputs):
        start, parts = inputs
        out, addends = block(start, *parts, seen=length)
        return jax.tree.map(jnp.add, totals, addends), out

    parts = tuple(split(x) for x in rows)
    shapes = jax.eval_shape(lambda: block(0, *(x[0] for x in parts), seen=length)[1])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    totals, outs = jax.lax.scan(step, zeros, (jnp.arange(0, length, size), parts))
    return tuple(join(x) for x in outs), totals


def _scores(q, k, segments, start, size):
    """float32 [P, R, keys]: scaled scores, -1e30 where attention is not allowed.

    Args:
      q: [P, R, H], R = G * size: the block of queries of each of the G query heads.
      k: [P, keys, H].
      segments: [P, S].
      start, size: position of the block's first query, and number of its positions.
    """
    scores = _dot("prh,pth->prt", q * q.shape[-1] ** -0.5, k)
    keys = scores.shape[-1]
    own = jax.lax.dynamic_slice_in_dim(segments, start, size, axis=1)
    causal = (start + jnp.arange(size))[:, None] >= jnp.arange(keys)
    allowed = causal & (own[:, :, None] == segments[:, None, :keys])
    return jnp.where(jnp.tile(allowed, (1, q.shape[1] // size, 1)), scores, -1e30)


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
