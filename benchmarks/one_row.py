"""How fast a vector times a bfloat16 matrix is, in each layout that XLA on a CPU might read.

    python -m benchmarks.one_row

Decoding one sequence in bfloat16 copies its matrices once, so that the contracted axis is the last
in memory. Each product here is timed over more matrices than caches hold: with that copy, and with
matrices as they are stored; beside the product in float32, which shows what memory delivers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sizes import SUITES
from benchmarks.vector_products import BYTES, Table, begin
from flexolmo_jax.modeling.kernels.quantized import Quantized

BLOCK = 16  # rows that are added up at a time


def copied(x, matrix):
    """As in decoding: the matrix is [outer, inner]."""
    return Quantized(matrix, None).matmul(x)[0]


def of_xla(x, matrix):
    return jnp.dot(x.astype(matrix.dtype), matrix, preferred_element_type=jnp.float32)[0]


def column_sums(x, matrix):
    return jnp.sum(x[0, :, None] * matrix.astype(jnp.float32), axis=0)


def in_blocks(x, matrix):
    """Sums of `BLOCK` rows, stored, and their sum.

    Without the barrier XLA fuses all sums into one loop; of 1408 rows it was not compiled after 100
    seconds.
    """
    inner, outer = matrix.shape
    rows = matrix.reshape(inner // BLOCK, BLOCK, outer)
    parts = x.reshape(inner // BLOCK, BLOCK)
    sums = sum(parts[:, j, None] * rows[:, j].astype(jnp.float32) for j in range(BLOCK))
    sums = jax.lax.optimization_barrier(sums)
    return sum(sums[i] for i in range(len(sums)))


WAYS: dict[str, tuple[Callable, Callable]] = {  # the product, and [inner, outer] as it needs it
    "float32": (lambda x, matrix: (x @ matrix)[0], lambda v: v),
    "bfloat16, copied as in decoding": (copied, lambda v: v.T.astype(jnp.bfloat16)),
    "bfloat16 as stored, XLA's product": (of_xla, lambda v: v.astype(jnp.bfloat16)),
    "bfloat16 as stored, sums of columns": (column_sums, lambda v: v.astype(jnp.bfloat16)),
    "bfloat16 as stored, sums of 16 rows": (in_blocks, lambda v: v.astype(jnp.bfloat16)),
}


def main() -> None:
    begin("one_row", __doc__)
    rng = np.random.default_rng(0)
    for name, size in SUITES["cpu"].items():
        width, hidden = size.config.width, size.config.ffn_width
        for inner, outer in ((width, width), (width, hidden), (hidden, width)):
            count = BYTES // (4 * inner * outer)
            drawn = rng.standard_normal((count, inner, outer), np.float32)
            values = drawn.astype(jnp.bfloat16).astype(np.float32)  # no way rounds them
            x = jnp.asarray(rng.standard_normal((1, inner), np.float32))
            expected = np.asarray(x[0], np.float64) @ values[0].astype(np.float64)
            table = Table(f"{name}: {inner} x {outer}", x, expected)
            for way, (product, convert) in WAYS.items():
                matrices = [(jax.device_put(np.ascontiguousarray(convert(v))),) for v in values]
                table.add(way, product, matrices, matrices[0][0].nbytes)
            print()


if __name__ == "__main__":
    main()
