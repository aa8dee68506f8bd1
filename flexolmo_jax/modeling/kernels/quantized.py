"""Matrices in the layout that decoding reads fastest, optionally rounded to 8-bit integers.

Decoding one sequence reads every weight once per token, so memory bandwidth bounds its speed, and
a quarter of the bytes is up to four times as fast. With `int8` only the weights are rounded;
activations, sums and scales stay float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

MAX_INT8 = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix [..., A, B]; `dot` takes it wherever it takes an array of that shape."""

    values: jax.Array  # [..., A, B], or [..., B, A] if transposed
    scale: jax.Array | None  # float32 [..., B]; None means 1
    transposed: bool = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def astype(self, dtype) -> "Quantized":
        """Returns itself, because `matmul` casts the values as it reads them."""
        return self

    def __getitem__(self, key) -> "Quantized":
        """Returns itself: modules read a weight as `weight[...]`."""
        assert key is ...
        return self

    def matmul(self, x: jax.Array) -> jax.Array:
        """[..., A] -> float32 [..., B]; the scale is applied after the sum.

        XLA fuses the cast into a vector-matrix product, and does not transpose in memory, only if
        both operations are next to the product, in the same branch of a `cond`, and the product is
        one of float32.
        """
        if self.transposed:
            product = jnp.matmul(x.astype(jnp.float32), self.values.astype(jnp.float32).mT)
        else:
            values = self.values.astype(x.dtype)
            product = jnp.matmul(x, values, preferred_element_type=jnp.float32)
        return product if self.scale is None else product * self.scale


def dot(x: jax.Array, weight: jax.Array | Quantized, dtype=None) -> jax.Array:
    """x @ weight, [..., A] times [A, B], summed in float32; returns `dtype`, or x's dtype."""
    if isinstance(weight, Quantized):
        return weight.matmul(x).astype(dtype or x.dtype)
    product = jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return product.astype(dtype or x.dtype)


def quantize(weight: jax.Array, transposed: bool, int8: bool) -> Quantized:
    """Copies a matrix [..., A, B].

    With `int8`, each output channel is rounded to 255 evenly spaced values between its largest
    magnitude and the negative of it.
    """
    scale = None
    if int8:
        scale = jnp.max(jnp.abs(weight), axis=-2).astype(jnp.float32) / MAX_INT8
        steps = weight / jnp.where(scale == 0, 1, scale)[..., None, :]
        weight = jnp.round(steps).astype(jnp.int8)
    return Quantized(weight.mT if transposed else weight, scale, transposed)


def round_matrix(weight: jax.Array) -> jax.Array:
    """The numbers that `quantize(..., int8=True)` stores, as floats; it stores them unchanged."""
    quantized = quantize(weight, transposed=False, int8=True)
    assert quantized.scale is not None
    return (quantized.values * quantized.scale[..., None, :]).astype(weight.dtype)
