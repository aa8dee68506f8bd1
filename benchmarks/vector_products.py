"""The time of products of a vector and a matrix, as decoding compiles them: a table's rows."""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.machine import machine, versions
from flexolmo_jax.inference.layerwise import OPTIONS, REORDERED_SUMS

BYTES = 400 << 20  # of all matrices in float32: more than caches hold


def begin(name: str, description: str | None) -> None:
    """Answers `--help` of `python -m benchmarks.NAME`, and prints what the tables are of."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print(f"{machine()}, {versions('jax')}, {time.strftime('%Y-%m-%d')}\n")


class Table:
    """Markdown, printed row by row: ways to multiply one vector and matrices of one shape."""

    def __init__(self, title: str, x: jax.Array, expected: np.ndarray):
        """
        Args:
          x: float32 [1, inner].
          expected: float64 [outer], its product with the first matrix.
        """
        self._x, self._expected = x, expected
        print(f"| {title} | us | GB/s | largest error |")
        print("| --- | ---: | ---: | ---: |")

    def add(self, way: str, product: Callable, matrices: list[tuple], num_bytes: float) -> None:
        """Prints a row.

        Args:
          product: called with x and the arrays of one matrix; returns [outer].
          num_bytes: of one matrix.
        """
        compiled = jax.jit(product, compiler_options=OPTIONS | REORDERED_SUMS)
        error = np.max(np.abs(compiled(self._x, *matrices[0]) - self._expected))
        error /= np.max(np.abs(self._expected))
        taken = microseconds(compiled, self._x, matrices)
        rate = num_bytes / taken / 1e3
        print(f"| {way} | {taken:.0f} | {rate:.1f} | {error:.0e} |", flush=True)


def microseconds(product: Callable, x: jax.Array, matrices: list[tuple]) -> float:
    """Of one product: the median of nine passes over all matrices."""
    jax.block_until_ready(product(x, *matrices[0]))
    passes = []
    for _ in range(9):
        begun = time.perf_counter()
        jax.block_until_ready([product(x, *matrix) for matrix in matrices])
        passes.append((time.perf_counter() - begun) / len(matrices))
    return 1e6 * float(np.median(passes))
