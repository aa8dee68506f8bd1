"""Which experts read which token (paper, section 3.3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from flexolmo_jax.modeling.layers import Expert


class Router(nnx.Module):
    """One row and one bias per expert and layer.

    The public expert's row is its owner's to choose and its bias is always 0; `bias` is held at or
    below 0 in use, so that an owner may only hold its expert back, never push it.
    """

    def __init__(self, num_layers: int, num_experts: int, width: int):
        self.row = Expert(jnp.zeros((num_layers, num_experts, width)))  # [L, E, D]
        self.bias = Expert(jnp.zeros((num_layers, num_experts)))  # [L, E]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits: [B, S, D] -> float32 [E, B, S].

        One matrix-vector product per expert, not one product for all: the rounding of an expert's
        logit then does not depend on how many experts stand beside it, which is what makes a
        masked expert and an expert that was never merged equal bit for bit.
        """
        x = x.astype(jnp.float32)

        def logit(row_and_bias):
            row, bias = row_and_bias
            return x @ row.astype(jnp.float32) + jnp.minimum(bias, 0.0)

        return jax.lax.map(logit, (self.row[...], self.bias[...]))


@jax.named_scope("route")
def route(logits: jax.Array, allowed: jax.Array, active: int, renormalize: bool) -> jax.Array:
    """Weights of the experts for each token.

    Args:
      logits: float32 [E, B, S].
      allowed: bool [B, E]; an expert that is not allowed gets weight exactly 0.
      active: how many experts a token may use (A); more than there are means all.
      renormalize: whether the weights that are kept are scaled to sum to 1.

    Returns:
      float32 [E, B, S]; at most A entries per token are not 0.
    """
    num_experts = logits.shape[0]
    if num_experts == 1:  # nothing to choose, and no gradient that is known to be 0 to compute
        return jnp.where(allowed.T[:, :, None], jnp.ones_like(logits), 0.0)
    logits = jnp.where(allowed.T[:, :, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=0))
    # One expert at a time, so that the sums below add finished numbers: a product fused into them
    # would be rounded differently (fused multiply-add) when another expert stands first.
    exp = jax.lax.map(lambda logit: jnp.exp(logit - top), logits)
    kept = exp
    if active < num_experts:
        _, chosen = jax.lax.top_k(jnp.moveaxis(exp, 0, -1), active)  # [B, S, A]
        is_chosen = jnp.any(chosen == jnp.arange(num_experts)[:, None, None, None], axis=-1)
        kept = jnp.where(is_chosen, exp, 0.0)
    return kept / _ordered_sum(kept if renormalize else exp)


@jax.named_scope("remember")
def remember(
    logits: jax.Array, segments: jax.Array, memory: tuple[float, float], past: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits that count in the earlier tokens of a document; not in the paper.

    To an expert's logit at token t is added weight * sum over s < t of decay^(t - s) * its logit at
    s, over the tokens of the same document. One token says little of the subject of a text, and
    its neighbours say more. An expert remembers its own logits only, so what others there are, or
    are allowed, changes nothing in it. A constant common to all experts cancels in the softmax, so
    these are as good as logits relative to the public expert's.

    Args:
      logits: float32 [E, B, S].
      segments: int32 [B, S]: documents; each begins with nothing to remember.
      memory: (decay, weight).
      past: float32 [E, B]: the decayed sum up to the token before the first one, of the same
        document; 0 where there is none.

    Returns:
      float32 [E, B, S], to route by; and [E, B], the sum up to the last token: the next `past`.
    """
    decay, weight = memory
    goes_on = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    kept = jnp.where(goes_on, decay, 0.0)  # [B, S]: share of the sum that each token finds

    def times(factor, sums):  # a logit may be -inf (`pad_experts`), and 0 times that is not 0
        return jnp.where(factor > 0, factor * sums, 0.0)

    def after(one, other):
        return one[0] * other[0], times(other[0], one[1]) + other[1]

    def expert(own):  # one at a time, as in `Router`: no expert's rounding depends on the others
        logits, past = own
        factors = jnp.pad(kept, ((0, 0), (1, 0)))
        terms = jnp.concatenate([past[:, None], logits], axis=1)
        _, sums = jax.lax.associative_scan(after, (factors, terms), axis=1)  # [B, 1 + S]
        return logits + weight * times(kept, sums[:, :-1]), sums[:, -1]

    return jax.lax.map(expert, (logits, past))


def _ordered_sum(x: jax.Array) -> jax.Array:
    """Sum over the first axis from first to last: an added 0 in any place changes no bit."""
    total = x[0]
    for part in x[1:]:
        total = total + part
    return total
