"""Matrices in the form that decoding reads fastest: turned, and where asked as 8-bit integers.

Decoding one sequence reads every weight once a token, so memory bandwidth is its limit, and a
quarter of the bytes is up to four times the speed. With `int8` only the weights are rounded;
activations, sums and scales stay float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix [..., A, B], where a layer expects an array of that shape."""

    values: jax.Array  # [..., A, B], or [..., B, A] if turned
    scale: jax.Array | None  # float32 [..., B]; None: 1
    turned: bool = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def astype(self, dtype) -> "Quantized":
        """Itself: the product casts on the way."""
        return self

    def __getitem__(self, key) -> "Quantized":
        """All of it: key is `...`."""
        assert key is ...
        return self

    def matmul(self, x: jax.Array) -> jax.Array:
        """[..., A] -> float32 [..., B]; the scale comes after the sum.

        XLA fuses the cast into its product of one row and a matrix, and turns nothing in memory,
        if both stand right beside it, in the same branch of a `cond`.
        """
        values = self.values.astype(x.dtype)
        product = jnp.matmul(
            x, values.mT if self.turned else values, preferred_element_type=jnp.float32
        )
        return product if self.scale is None else product * self.scale


def store(weight: jax.Array, turned: bool, int8: bool) -> Quantized:
    """Copies a matrix [..., A, B].

    With `int8`, to 255 steps between the largest value of an output channel and its negative.
    """
    scale = None
    if int8:
        scale = jnp.max(jnp.abs(weight), axis=-2).astype(jnp.float32) / LARGEST
        steps = weight / jnp.where(scale == 0, 1, scale)[..., None, :]
        weight = jnp.round(steps).astype(jnp.int8)
    return Quantized(weight.mT if turned else weight, scale, turned)


def rounded(weight: jax.Array) -> jax.Array:
    """The numbers that `store(..., int8=True)` keeps, as floats; it then keeps them as they are."""
    stored = store(weight, turned=False, int8=True)
    assert stored.scale is not None
    return (stored.values * stored.scale[..., None, :]).astype(weight.dtype)
