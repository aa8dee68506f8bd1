"""SwiGLU of one expert, with a gradient that keeps two hidden activations instead of five."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexolmo_jax.modeling.kernels.quantized import dot


@jax.custom_vjp
def swiglu(
    x: Float[Array, "*T D"],
    weight: Float[Array, "*T"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
) -> Float[Array, "*T D"]:
    """weight * (silu(x @ gate) * (x @ up)) @ down: what an expert adds to the mixture.

    The backward pass keeps two arrays [..., F] instead of the five that JAX would keep. It does not
    keep the expert's output either, though the gradient of `weight` is <output, d_out>: that equals
    <hidden, d_out @ down.T>, and the backward pass computes both factors anyway.
    """
    return weight[..., None] * dot(jax.nn.silu(dot(x, gate)) * dot(x, up), down)


def _forward(x, weight, gate, up, down):
    is_trained = any(matrix.perturbed for matrix in (gate, up, down))
    x, weight, gate, up, down = (leaf.value for leaf in (x, weight, gate, up, down))
    g, u = dot(x, gate), dot(x, up)
    out = weight[..., None] * dot(jax.nn.silu(g) * u, down)
    return out, (x if is_trained else None, weight, g, u, gate, up, down)


def _backward(residuals, d_out):
    x, weight, g, u, gate, up, down = residuals
    sigmoid = jax.nn.sigmoid(g)
    silu = g * sigmoid
    hidden = silu * u
    d_output = dot(d_out, down.T)
    d_weight = jnp.sum(d_output * hidden, axis=-1, dtype=jnp.float32).astype(weight.dtype)
    d_hidden = weight[..., None] * d_output
    d_g = d_hidden * u * (sigmoid + silu * (1 - sigmoid))
    d_u = d_hidden * silu
    d_x = dot(d_g, gate.T) + dot(d_u, up.T)
    if x is None:  # the matrices are frozen
        return d_x, d_weight, None, None, None
    d_down = _outer(hidden, weight[..., None] * d_out)
    return d_x, d_weight, _outer(x, d_g), _outer(x, d_u), d_down


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """[..., A], [..., B] -> [A, B], summed over the leading axes."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


swiglu.defvjp(_forward, _backward, symbolic_zeros=True)
