"""Whether a vector times a matrix in 4-bit integers could be faster than in 8: a table.

    python -m benchmarks.four_bits

Decoding one sequence on a CPU reads each weight once, and int4 has half of int8's bytes. Each way of
writing the product that XLA might make fast is timed over more matrices than caches hold, beside the
product in 8 bits that decoding uses and the one in float32. The last way has scales of groups, eight
for each output, as 4 bits need: of 64 weights at 50M (4.5 bits each) and 128 at 190M (4.25).
"""  # noqa: E501

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sizes import SUITES
from benchmarks.vector_products import BYTES, Table, begin
from flexolmo_jax.modeling.kernels.quantized import Quantized

NIBBLES = 8  # in an int32


def packed(values: np.ndarray) -> np.ndarray:
    """[N, K] of [-8, 7] -> int32 [N, K / 8]; nibble j of word i is column j * K / 8 + i."""
    rows, columns = values.shape
    words = (values + 8).astype(np.uint32).reshape(rows, NIBBLES, columns // NIBBLES)
    shifted = words << (4 * np.arange(NIBBLES, dtype=np.uint32))[None, :, None]
    return np.bitwise_or.reduce(shifted, axis=1).view(np.int32)


def nibble(words: jax.Array, number: int) -> jax.Array:
    return ((words >> (4 * number)) & 15).astype(jnp.float32)


def terms(x: jax.Array, words: jax.Array) -> jax.Array:
    """float32 [N, K / 8]: of each word, its nibbles times their inputs."""
    parts = x.reshape(NIBBLES, -1)
    return sum(nibble(words, j) * parts[j] for j in range(NIBBLES))


def summed(x, words, scale):
    """The terms of each row are summed, without being stored if XLA fuses them."""
    return (jnp.sum(terms(x, words), axis=1) - 8 * jnp.sum(x)) * scale


def stored(x, words, scale):
    """The terms are stored, and a matrix-vector product sums them."""
    return (terms(x, words) @ jnp.ones(words.shape[1]) - 8 * jnp.sum(x)) * scale


def in_groups(x, words, scales):
    """As `stored`, with a scale for each output and nibble, float32 [N, 8]."""
    parts = x.reshape(NIBBLES, -1)
    scaled = sum((nibble(words, j) - 8) * scales[:, j : j + 1] * parts[j] for j in range(NIBBLES))
    return scaled @ jnp.ones(words.shape[1])


def unpacked(x, words, scale):
    """Eight matrix-vector products, one for each nibble."""
    parts = x.reshape(NIBBLES, -1)
    sums = sum(nibble(words, j) @ parts[j] for j in range(NIBBLES))
    return (sums - 8 * jnp.sum(x)) * scale


def of_jax(x, values, scale):
    """JAX's own int4."""
    return (x @ values.astype(jnp.float32).mT)[0] * scale


def in_int8(x, values, scale):
    return Quantized(values, scale).matmul(x)[0]


def in_float32(x, values, scale):
    return (values @ x[0]) * scale


WAYS: dict[str, tuple[Callable, Callable, float]] = {  # the product, the weights, bytes of each
    "float32": (in_float32, lambda v: v.astype(np.float32), 4),
    "int8": (in_int8, lambda v: v, 1),
    "int4, jnp.int4": (of_jax, lambda v: jnp.asarray(v).astype(jnp.int4), 0.5),
    "int4 in words, sums": (summed, packed, 0.5),
    "int4 in words, stored terms": (stored, packed, 0.5),
    "int4 in words, 8 products": (unpacked, packed, 0.5),
    "int4 in words, stored terms, groups": (in_groups, packed, 0.5),
}


def main() -> None:
    begin("four_bits", __doc__)
    rng = np.random.default_rng(0)
    for name, size in SUITES["cpu"].items():
        inner, outer = size.config.width, size.config.ffn_width
        count = BYTES // (4 * inner * outer)
        values = [rng.integers(-8, 8, (outer, inner), np.int8) for _ in range(count)]
        x = jnp.asarray(rng.standard_normal((1, inner), np.float32))
        expected = values[0].astype(np.float64) @ np.asarray(x[0], np.float64)
        table = Table(f"{name}: {inner} x {outer}", x, expected)
        for way, (product, convert, weight_bytes) in WAYS.items():
            shape = (outer, NIBBLES) if product is in_groups else (outer,)
            matrices = [(jax.device_put(convert(v)), jnp.ones(shape)) for v in values]
            table.add(way, product, matrices, weight_bytes * inner * outer)
        print()


if __name__ == "__main__":
    main()
