"""Routing: the weight of each expert for each token (paper, section 3.3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.modeling.layers import Expert


class Router(nnx.Module):
    """A linear router with one row and one bias per expert and layer.

    The public expert's bias is always 0. Biases above 0 count as 0, so an owner can make its own
    expert fire less often, but never more often.
    """

    def __init__(self, num_layers: int, num_experts: int, width: int):
        self.row = Expert(jnp.zeros((num_layers, num_experts, width)))  # [L, E, D]
        self.bias = Expert(jnp.zeros((num_layers, num_experts)))  # [L, E]

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "E B S"]:
        """The logits, in float32.

        One matrix-vector product per expert instead of one matmul for all: the rounding of an
        expert's logit then does not depend on how many other experts there are. This makes a
        masked expert equal, bit for bit, to an expert that was never merged.
        """
        x = x.astype(jnp.float32)

        def logit(row_and_bias):
            row, bias = row_and_bias
            return x @ row.astype(jnp.float32) + jnp.minimum(bias, 0.0)

        rows = self.row[...], self.bias[...]
        if len(rows[0]) > 1:
            return jax.lax.map(logit, rows)
        # XLA unrolls a loop of one step, and then multiplies in another order.
        twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), rows)
        return jax.lax.map(logit, twice)[:1]


@jax.named_scope("route")
def route(
    logits: Float[Array, "E B S"], allowed: Bool[Array, "B E"], active: int, renormalize: bool
) -> Float[Array, "E B S"]:
    """Weights of the experts for each token.

    Args:
      logits: float32.
      allowed: an expert that is not allowed gets weight exactly 0.
      active: the number of experts that a token may use (A); if A >= E, it uses all of them.
      renormalize: whether the weights of the A chosen experts are scaled to sum to 1.

    Returns:
      float32; at most A entries per token are not 0.
    """
    num_experts = logits.shape[0]
    if num_experts == 1:  # its weight is 1 and the gradient of its logit is 0
        return jnp.where(allowed.T[:, :, None], jnp.ones_like(logits), 0.0)
    logits = jnp.where(allowed.T[:, :, None], logits, -jnp.inf)
    max_logit = jax.lax.stop_gradient(jnp.max(logits, axis=0))
    # `lax.map` materializes the exponentials before the sums below add them. XLA could otherwise
    # fuse a product into a sum (fused multiply-add), and the rounding would then depend on which
    # expert comes first.
    exp = jax.lax.map(lambda logit: jnp.exp(logit - max_logit), logits)
    chosen_exp = exp
    if active < num_experts:
        _, chosen = jax.lax.top_k(jnp.moveaxis(exp, 0, -1), active)  # [B, S, A]
        is_chosen = jnp.any(chosen == jnp.arange(num_experts)[:, None, None, None], axis=-1)
        chosen_exp = jnp.where(is_chosen, exp, 0.0)
    return chosen_exp / _ordered_sum(chosen_exp if renormalize else exp)


@jax.named_scope("remember")
def add_decayed_logits(
    logits: Float[Array, "E B S"],
    segments: Int[Array, "B S"],
    memory: tuple[float, float],
    router_state: Float[Array, "E B"],
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "E B S"], Float[Array, "E B"]]:
    """Adds to each logit a decayed sum of the expert's earlier logits; not in the paper.

    The logit of token t grows by weight * sum over s < t of decay^(t - s) * (the logit of s), over
    the earlier tokens of its document: one token says little about the subject of a text, and the
    tokens before it say more. Each expert sums its own logits only, so the sum does not depend on
    which other experts exist or are allowed. A constant common to all experts cancels in the
    softmax, so the result does not depend on the public expert's row.

    Args:
      logits: float32.
      segments: the document of each token; every document begins with an empty sum.
      memory: (decay, weight).
      router_state: float32, the decayed sum up to the token before the first one, if that
        token is of the same document; else 0.
      lengths: the tokens of each sequence; what comes after them is padding. Default: all.

    Returns:
      the logits to route by; and the decayed sum up to the last token, which is the next
      `router_state`.
    """
    decay, weight = memory
    same_document = segments[:, 1:] == segments[:, :-1]
    is_same = jnp.pad(same_document, ((0, 0), (1, 0)), constant_values=True)
    decays = jnp.where(is_same, decay, 0.0)  # [B, S]: factor of the sum that each token receives

    def times(factor, sums):  # padding experts have logits of -inf (`pad_experts`); 0 * -inf is NaN
        return jnp.where(factor > 0, factor * sums, 0.0)

    def combine(left, right):
        return left[0] * right[0], times(right[0], left[1]) + right[1]

    def sum_of_expert(inputs):  # expert by expert, as in `Router`: rounding is independent of E
        logits, router_state = inputs
        factors = jnp.pad(decays, ((0, 0), (1, 0)))
        terms = jnp.concatenate([router_state[:, None], logits], axis=1)
        _, sums = jax.lax.associative_scan(combine, (factors, terms), axis=1)  # [B, 1 + S]
        last = sums[:, -1] if lengths is None else sums[jnp.arange(len(sums)), lengths]
        return logits + weight * times(decays, sums[:, :-1]), last

    return jax.lax.map(sum_of_expert, (logits, router_state))


def _ordered_sum(x: jax.Array) -> jax.Array:
    """Sums the first axis from first to last, so that inserting a 0 anywhere changes no bit."""
    total = x[0]
    for addend in x[1:]:
        total = total + addend
    return total
