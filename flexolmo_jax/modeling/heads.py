"""Low-rank heads: what each expert adds to the logits of the backbone's output head.

A feed-forward network behind frozen attention and a frozen head cannot raise or lower a token for
all contexts at once; a low-rank delta of the head can. It is not in the paper.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flexolmo_jax.modeling.layers import Expert, normal
from flexolmo_jax.parallel import collectives

# Columns of a product. The rank of a stack is that of its widest head, and a longer sum would be
# another one in its last bits; a further block of zeros adds exactly 0.
RANK_BLOCK = 64


class LowRankHead(nnx.Module):
    """x A + c, with A = a b of rank R, for each expert of a stack.

    Leading axes are [1, E]: a head is one per model, and merging concatenates the second axis, as
    of every part of an expert.
    """

    def __init__(self, num_experts: int, width: int, vocab_size: int, rank: int, key: jax.Array):
        lead = (1, num_experts)
        self.a = Expert(normal(key, *lead, width, rank, std=rank**-0.5))  # [1, E, D, R]
        self.b = Expert(jnp.zeros((*lead, rank, vocab_size)))  # [1, E, R, V]
        self.bias = Expert(jnp.zeros((*lead, vocab_size)))  # [1, E, V]

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def experts(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """a, b and bias with the leading axis E."""
        return self.a[...][0], self.b[...][0], self.bias[...][0]

    def blocks(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """a [E, n, D, RANK_BLOCK], b [E, n, RANK_BLOCK, V] and bias [E, n, V], to be scanned over.

        The last block is padded with zeros; the bias is that of the first.
        """
        a, b, bias = self.experts()
        missing = -self.rank % RANK_BLOCK
        a = jnp.pad(a, ((0, 0), (0, 0), (0, missing)))
        b = jnp.pad(b, ((0, 0), (0, missing), (0, 0)))
        count = a.shape[-1] // RANK_BLOCK
        a = jnp.moveaxis(a.reshape(*a.shape[:2], count, RANK_BLOCK), 2, 1)
        b = b.reshape(len(b), count, RANK_BLOCK, b.shape[-1])
        return a, b, jnp.pad(bias[:, None], ((0, 0), (0, count - 1), (0, 0)))

    @jax.named_scope("heads")
    def add(
        self,
        logits: Float[Array, "*T V"],
        hidden: Float[Array, "*T D"],
        weights: Float[Array, "E ..."],
    ) -> Float[Array, "*T V"]:
        """logits + sum over e of weights[e] * delta_e(hidden), block by block, in float32.

        The order is fixed, and an expert whose weight is 0 adds nothing, even if its own weights
        are NaN; so masking an expert equals leaving it out of the stack, bit for bit, whatever the
        ranks of the others are.
        """
        blocks = self.blocks()
        num_experts, count = blocks[-1].shape[:2]
        flat = (x.reshape(num_experts * count, *x.shape[2:]) for x in blocks)

        def step(total, block):
            *own, weight = block
            weight = weight[..., None]
            return total + jnp.where(weight > 0, weight * delta(hidden, *own), 0.0), None

        return jax.lax.scan(step, logits, (*flat, jnp.repeat(weights, count, axis=0)))[0]

    def columns(
        self, hidden: Float[Array, "B S D"], weights: Float[Array, "E B S"] | None = None
    ) -> tuple[Float[Array, "B S W"], Float[Array, "W V"]]:
        """The sum in `add` as one matmul, for losses that hold no [B, S, V]; equal up to rounding.

        W = E (R + 1): [w_e h a_e, w_e] times [b_e; c_e], to stand beside the hidden states and the
        backbone's head.

        Args:
          hidden: after the last norm.
          weights: default: 1 for every expert.
        """
        a, b, bias = (x.astype(hidden.dtype) for x in self.experts())
        b, bias = collectives.copy_to_tensor_parallel((b, bias))
        if weights is None:
            weights = jnp.ones((len(a), *hidden.shape[:2]))
        weights = jnp.moveaxis(weights, 0, -1).astype(hidden.dtype)  # [B, S, E]
        low = jnp.einsum("bsd,edr->bser", hidden, a) * weights[..., None]
        low = low.reshape(*hidden.shape[:2], -1)
        rows = jnp.concatenate([b.reshape(-1, b.shape[-1]), bias])
        return jnp.concatenate([low, weights], axis=-1), rows


def delta(
    hidden: Float[Array, "*T D"],
    a: Float[Array, "D R"],
    b: Float[Array, "R V"],
    bias: Float[Array, " V"],
) -> Float[Array, "*T V"]:
    """What one expert, or one block of its rank, adds to the logits; float32."""
    low = (hidden @ a.astype(hidden.dtype)).astype(hidden.dtype)
    out = jnp.matmul(low, b.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return out + bias.astype(jnp.float32)
