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


def _ordered_sum(x: jax.Array) -> jax.Array:
    """Sum over the first axis from first to last: an added 0 in any place changes no bit."""
    total = x[0]
    for part in x[1:]:
        total = total + part
    return total
