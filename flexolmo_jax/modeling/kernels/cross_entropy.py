"""Cross-entropy over a large vocabulary, without the logits of all tokens in memory at once.

The sequence is worked on in chunks. When a gradient is asked for, it is computed together with the
loss while a chunk's logits are at hand, so they are neither kept nor computed again.
"""

import functools

import jax
import jax.numpy as jnp


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over the tokens of a batch.

    Args:
      hidden: [B, S, D], after the last norm.
      head: [D, V].
      targets: int32 [B, S].
      weights: float32 [B, S], of each token in the sums; no gradient flows into them.
      z_loss: weight of logsumexp(logits)^2.
      chunk: positions of each sequence that are worked on at a time.

    Returns:
      float32 scalars: sum of weights * (cross-entropy + z_loss * logsumexp^2), to be minimised;
      and sum of weights * cross-entropy in nats, for which there is no gradient.
    """
    chunk = min(chunk, hidden.shape[1])
    total, nats = _sums(hidden, head.astype(hidden.dtype), targets, weights, z_loss, chunk)
    return total, jax.lax.stop_gradient(nats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(hidden, head, targets, weights, z_loss, chunk):
    def one(sums, part):
        terms, nats, *_ = _chunk(part, head, z_loss)
        return (sums[0] + terms, sums[1] + nats), None

    parts = tuple(_split(x, chunk) for x in (hidden, targets, weights))
    return jax.lax.scan(one, (jnp.zeros(()), jnp.zeros(())), parts)[0]


def _forward(hidden, head, targets, weights, z_loss, chunk):
    hidden, head, targets, weights = (
        hidden.value, head, targets.value, weights.value,
    )  # fmt: skip
    trained, head = head.perturbed, head.value

    def one(carry, part):
        total, nats, d_head = carry
        terms, more, log_total, logits, is_target = _chunk(part, head, z_loss)
        probability = jnp.exp(logits - log_total)
        pull = 1.0 + 2.0 * z_loss * log_total
        d_logits = part[2][..., None] * (probability * pull - is_target)
        d_logits = d_logits.astype(head.dtype)
        d_hidden = jnp.einsum("bcv,dv->bcd", d_logits, head)
        if trained:
            new = jnp.einsum("bcd,bcv->dv", part[0], d_logits, preferred_element_type=jnp.float32)
            d_head += new
        return (total + terms, nats + more, d_head), d_hidden

    parts = tuple(_split(x, chunk) for x in (hidden, targets, weights))
    d_head = jnp.zeros(head.shape if trained else (), jnp.float32)
    zero = jnp.zeros(())
    (total, nats, d_head), d_hidden = jax.lax.scan(one, (zero, zero, d_head), parts)
    batch, length, width = hidden.shape
    d_hidden = d_hidden.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]
    return (total, nats), (d_hidden, d_head.astype(head.dtype) if trained else None)


def _backward(z_loss, chunk, kept, d_sums):
    d_hidden, d_head = kept
    scale = d_sums[0]  # the second sum is for show
    d_hidden = (scale * d_hidden).astype(d_hidden.dtype)
    return d_hidden, None if d_head is None else (scale * d_head).astype(d_head.dtype), None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunk(part, head, z_loss):
    hidden, targets, weights = part  # [B, C, D], [B, C], [B, C]
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A masked sum, not a gather, which would have to be vectorised by hand on some backends.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    nats = jnp.sum(weights * (log_total[..., 0] - jnp.sum(logits * is_target, axis=-1)))
    terms = nats + z_loss * jnp.sum(weights * log_total[..., 0] ** 2)
    return terms, nats, log_total, logits, is_target


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [S / chunk, B, chunk, ...]; what is missing at the end is 0."""
    batch, length = x.shape[:2]
    missing = -length % chunk
    x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
