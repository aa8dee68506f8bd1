"""Matrices in the layout that decoding on a CPU reads fastest, optionally in 8-bit integers.

Decoding one sequence reads every weight once per token, so memory bandwidth bounds its speed, and
a quarter of the bytes is up to four times as fast. In 8 bits only weights are rounded. For several
rows, XLA has fast matmuls of 8-bit integers on both sides, and none of integers and floats; so
there each activation is written as three such integers, which keep as much of it as float32 does.
"""

import dataclasses

import jax
import jax.numpy as jnp

MAX_INT8 = 127
DIGITS = 3  # of an activation
BASE = 2 * MAX_INT8  # the remainder of rounding to a digit, at most 1/2, times this is the next one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix [..., A, B]; `dot` takes it wherever it takes an array of that shape."""

    values: jax.Array  # [..., B, A]: the contracted axis is the last in memory
    scale: jax.Array | None  # of int8 values, float32 [..., B]; None: the values are floats

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, b, a = self.values.shape
        return (*lead, a, b)

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
        """[..., A] -> float32 [..., B]."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        if len(rows) == 1:  # XLA would compute what made the row for each sum, in its loop
            rows = jax.lax.optimization_barrier(rows)
        if self.scale is None or len(rows) == 1:
            # XLA fuses the cast into a vector-matrix product, and does not transpose in memory,
            # only if both operations are next to it, in the same branch of a `cond`.
            product = jnp.matmul(rows, self.values.astype(jnp.float32).mT)
            product = product if self.scale is None else product * self.scale
            return product.reshape(*x.shape[:-1], -1)
        digits, unit = _digits(rows)
        # Sums of integers are exact, and below 2**31 for A < 133,000.
        sums = jax.lax.dot_general(
            digits, self.values, (((2,), (1,)), ((), ())), preferred_element_type=jnp.int32
        ).astype(jnp.float32)  # [DIGITS, T, B]
        total = sums[DIGITS - 1]
        for number in reversed(range(DIGITS - 1)):
            total = sums[number] + total / BASE
        product = total * unit * self.scale
        return product.reshape(*x.shape[:-1], -1)


def _digits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[T, A] -> int8 [DIGITS, T, A] and a unit [T, 1]: x = unit * (d0 + d1 / BASE + ...).

    The error is at most 2**-24 of the row's largest magnitude; a row that is not finite has a unit
    that is not finite.
    """
    unit = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / MAX_INT8
    rest, digits = x / jnp.where(unit == 0, 1, unit), []
    for _ in range(DIGITS):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * BASE
    return jnp.stack(digits), unit


def dot(x: jax.Array, weight: jax.Array | Quantized, dtype=None) -> jax.Array:
    """x @ weight, [..., A] times [A, B], summed in float32; returns `dtype`, or x's dtype."""
    if isinstance(weight, Quantized):
        return weight.matmul(x).astype(dtype or x.dtype)
    product = jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return product.astype(dtype or x.dtype)


def quantize(weight: jax.Array, int8: bool) -> Quantized:
    """Copies a matrix [..., A, B].

    With `int8`, each output channel is rounded to 255 evenly spaced values between its largest
    magnitude and the negative of it.
    """
    if not int8:
        return Quantized(weight.mT, None)
    scale = jnp.max(jnp.abs(weight), axis=-2).astype(jnp.float32) / MAX_INT8
    steps = weight / jnp.where(scale == 0, 1, scale)[..., None, :]
    return Quantized(jnp.round(steps).astype(jnp.int8).mT, scale)


def round_matrix(weight: jax.Array) -> jax.Array:
    """The numbers that `quantize(..., int8=True)` stores, as floats; it stores them unchanged."""
    quantized = quantize(weight, int8=True)
    assert quantized.scale is not None
    return (quantized.values.mT * quantized.scale[..., None, :]).astype(weight.dtype)
