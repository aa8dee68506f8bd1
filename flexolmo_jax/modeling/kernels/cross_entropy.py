"""Cross-entropy over a large vocabulary, without the logits of all tokens in memory at once.

The sequence is processed in chunks. Under `jax.grad` the gradient is computed together with the
loss, while a chunk's logits are in memory, so that they are neither kept nor recomputed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    *,
    z_loss: float = 0.0,
    chunk: int = 128,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the cross-entropy over the tokens of a batch.

    Args:
      hidden: after the last norm.
      head, targets: the output matrix and the next tokens.
      weights: float32, of each token in the sums; no gradient flows into them.
      z_loss: weight of logsumexp(logits)^2.
      chunk: positions of each sequence per step of the loop.

    Returns:
      float32 scalars: sum of weights * (cross-entropy + z_loss * logsumexp^2), to be minimised;
      and sum of weights * cross-entropy in nats, for which there is no gradient.
    """
    chunk = min(chunk, hidden.shape[1])
    total, nats = _sums(hidden, head.astype(hidden.dtype), targets, weights, z_loss, chunk)
    return total, jax.lax.stop_gradient(nats)


def nats_of_chunks(
    logits_of: Callable[..., Float[Array, "B C V"]],
    inputs: tuple[Float[Array, "B S ..."], ...],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int = 128,
) -> Float[Array, ""]:
    """The second sum of `cross_entropy`, where the logits are no single matmul.

    Args:
      logits_of: takes `chunk` positions of each of the `inputs`.
      targets, weights, chunk: as in `cross_entropy`.
    """
    chunk = min(chunk, targets.shape[1])

    def step(total, chunk):
        inputs, targets, weights = chunk
        logits = logits_of(*inputs)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - chosen
        return total + jnp.sum(jnp.where(weights > 0, weights * nats, 0.0)), None

    chunks = jax.tree.map(lambda x: _split(x, chunk), (inputs, targets, weights))
    return jax.lax.scan(step, jnp.zeros(()), chunks)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(hidden, head, targets, weights, z_loss, chunk):
    def step(sums, inputs):
        total, nats, *_ = _sums_of_chunk(inputs, head, z_loss)
        return (sums[0] + total, sums[1] + nats), None

    chunks = tuple(_split(x, chunk) for x in (hidden, targets, weights))
    return jax.lax.scan(step, (jnp.zeros(()), jnp.zeros(())), chunks)[0]


def _forward(hidden, head, targets, weights, z_loss, chunk):
    is_trained = head.perturbed
    hidden, head, targets, weights = (x.value for x in (hidden, head, targets, weights))

    def step(carry, inputs):
        total, nats, d_head = carry
        hidden, _, weights = inputs
        more, more_nats, log_total, logits, is_target = _sums_of_chunk(inputs, head, z_loss)
        probability = jnp.exp(logits - log_total)
        d_log_total = 1.0 + 2.0 * z_loss * log_total
        d_logits = weights[..., None] * (probability * d_log_total - is_target)
        d_logits = d_logits.astype(head.dtype)
        d_hidden = jnp.einsum("bcv,dv->bcd", d_logits, head)
        if is_trained:
            new = jnp.einsum("bcd,bcv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
            d_head += new
        return (total + more, nats + more_nats, d_head), d_hidden

    chunks = tuple(_split(x, chunk) for x in (hidden, targets, weights))
    d_head = jnp.zeros(head.shape if is_trained else (), jnp.float32)
    zero = jnp.zeros(())
    (total, nats, d_head), d_hidden = jax.lax.scan(step, (zero, zero, d_head), chunks)
    batch, length, width = hidden.shape
    d_hidden = d_hidden.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]
    return (total, nats), (d_hidden, d_head.astype(head.dtype) if is_trained else None)


def _backward(z_loss, chunk, residuals, d_sums):
    d_hidden, d_head = residuals
    scale = d_sums[0]  # the sum of nats is a metric and has no gradient
    d_hidden = (scale * d_hidden).astype(d_hidden.dtype)
    return d_hidden, None if d_head is None else (scale * d_head).astype(d_head.dtype), None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _sums_of_chunk(inputs, head, z_loss):
    hidden, targets, weights = inputs  # [B, C, D], [B, C], [B, C]
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A masked sum instead of a gather, which some backends do not vectorize.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    nats = jnp.sum(weights * (log_total[..., 0] - jnp.sum(logits * is_target, axis=-1)))
    total = nats + z_loss * jnp.sum(weights * log_total[..., 0] ** 2)
    return total, nats, log_total, logits, is_target


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [S / chunk, B, chunk, ...]; the end is padded with 0."""
    batch, length = x.shape[:2]
    missing = -length % chunk
    x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
