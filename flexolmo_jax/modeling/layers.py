"""The kinds of weights there are, RMSNorm, and rotary positions.

Modules here declare weights and how they act. A module is a pytree: it goes through `jax.jit`,
`jax.grad`, `jax.lax.scan` and `jax.tree.map` as it is, and nothing changes it in a call. Weights
that exist once per layer are stacked, with a leading axis L; inside the scan over layers a module
sees its own slice, without that axis.

Letters in shapes: B batch, S sequence, D model width, N query heads, K key/value heads, H head
width, F feed-forward width, E experts, A active experts, V vocabulary, L layers, T = B*S tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flexolmo_jax.modeling.kernels.quantized import Quantized
from flexolmo_jax.parallel import collectives


class Shared(nnx.Variable):
    """A weight that all owners share, and that nobody trains after the public stage."""


class Expert(nnx.Param):
    """A weight of one data owner; its leading axes are [L, E], so that merging is concatenation."""


def normal(key: jax.Array, *shape: int, std: float = 0.02) -> jax.Array:
    """float32 draws from a normal distribution cut at three standard deviations."""
    return std * jax.random.truncated_normal(key, -3.0, 3.0, shape)


def dot(x: jax.Array, weight: jax.Array | Quantized, dtype=None) -> jax.Array:
    """x @ weight, [..., A] times [A, B], summed in float32; of x's dtype, or another."""
    if isinstance(weight, Quantized):
        return weight.matmul(x).astype(dtype or x.dtype)
    product = jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return product.astype(dtype or x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, over as many trailing axes as `scale` has; float32 inside."""

    def __init__(self, num_layers: int | None, *shape: int):
        stack = () if num_layers is None else (num_layers,)
        self.scale = Shared(jnp.ones((*stack, *shape)))

    def __call__(self, x: jax.Array, eps: float) -> jax.Array:
        scale = self.scale[...]
        axes = tuple(range(-scale.ndim, 0))
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32 * x32, axis=axes, keepdims=True)
        if x.shape[axes[0]] < len(scale):  # other devices have the other heads
            scale, mean = (
                collectives.local_heads(scale, x.shape[axes[0]]),
                collectives.pmean_tensor(mean),
            )
        return (scale * (x32 * jax.lax.rsqrt(mean + eps))).astype(x.dtype)


@jax.named_scope("rope")
def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, halves convention (as in OLMo 2).

    Args:
      x: [B, S, heads, H] queries or keys; H is even.
      positions: int32 [B, S].
      theta: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, S, 1, H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
