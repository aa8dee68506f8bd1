"""Shared and expert weights, RMSNorm, and rotary position embeddings.

Modules here declare weights and how they act. A module is a pytree: it passes through `jax.jit`,
`jax.grad`, `jax.lax.scan` and `jax.tree.map`, and no call changes it. Weights that every layer has
are stacked, with a leading axis L; inside the scan over layers a module holds its own slice,
without that axis.

Letters in shapes: B batch, S sequence, D model width, N query heads, K key/value heads, H head
width, F feed-forward width, E experts, A active experts, V vocabulary, L layers, T = B*S tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flexolmo_jax.parallel import collectives


class Shared(nnx.Variable):
    """A weight that all owners share; it is frozen after the public stage."""


class Expert(nnx.Param):
    """A weight of one data owner; its leading axes are [L, E], so that merging is concatenation."""


def normal(key: jax.Array, *shape: int, std: float = 0.02) -> jax.Array:
    """float32 draws from a normal distribution truncated at three standard deviations."""
    return std * jax.random.truncated_normal(key, -3.0, 3.0, shape)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over as many trailing axes as `scale` has, computed in float32."""

    def __init__(self, num_layers: int | None, *shape: int):
        stack = () if num_layers is None else (num_layers,)
        self.scale = Shared(jnp.ones((*stack, *shape)))

    def __call__(self, x: jax.Array, eps: float) -> jax.Array:
        scale = self.scale[...]
        axes = tuple(range(-scale.ndim, 0))
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32 * x32, axis=axes, keepdims=True)
        if x.shape[axes[0]] < len(scale):  # tensor parallelism: this device holds some of the heads
            scale = collectives.local_heads(scale, x.shape[axes[0]])
            mean = collectives.pmean_tensor(mean)
        return (scale * (x32 * jax.lax.rsqrt(mean + eps))).astype(x.dtype)


@jax.named_scope("rope")
def rotate(
    x: Float[Array, "B S heads H"], positions: Int[Array, "B S"], theta: float
) -> Float[Array, "B S heads H"]:
    """Rotary position embedding of queries or keys, halves convention (as in OLMo 2).

    `theta` is the base of the wavelengths; H must be even.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, S, 1, H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
