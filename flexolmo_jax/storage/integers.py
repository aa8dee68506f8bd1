"""Matrices as integers of 8 or 4 bits, with the largest size that each run of rows can have.

A run is a part of a column of a matrix [I, O], whose I is the axis that a product sums over: all of
it, for a scale for each output channel, or `group` rows. Its numbers are peak * code / LARGEST.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.storage.on_disk import ranges_of

LARGEST = {"int8": 127, "int4": 7}  # codes are -LARGEST to LARGEST
PEAK = ".peak"  # ends the name of the peaks of a matrix
SHRINKS = np.linspace(1.0, 0.7, 7)  # of a peak: cutting the largest numbers can round all better


class Codes(NamedTuple):
    """A stack of matrices [..., I, O] in integers.

    Attributes:
      codes: int8 [..., I, O]; or, of 4 bits, uint8 [..., ceil(I / 2), O]: two codes above -8, the
        first row in the low bits.
      peaks: float32 [..., ceil(I / group), O].
    """

    codes: np.ndarray
    peaks: np.ndarray


def stored_shapes(
    shape: tuple[int, ...], dtype: str, group: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `Codes` of a matrix [..., I, O]; `group` None: all rows."""
    *lead, rows, columns = shape
    of_codes = rows if dtype == "int8" else -(-rows // 2)
    return (*lead, of_codes, columns), (*lead, -(-rows // (group or rows)), columns)


def to_codes(matrix: np.ndarray, dtype: str, group: int | None) -> Codes:
    """Rounds matrices, each run with the peak that has the smallest squared error.

    Args:
      matrix: [..., I, O], float.
      dtype: "int8" or "int4".
      group: rows of a run; None: all.
    """
    rows, largest = matrix.shape[-2], LARGEST[dtype]
    group = min(group or rows, rows)
    padding = [(0, 0)] * (matrix.ndim - 2) + [(0, -rows % group), (0, 0)]
    runs = np.pad(np.asarray(matrix, np.float32), padding)
    runs = runs.reshape(*runs.shape[:-2], -1, group, runs.shape[-1])
    highest = np.abs(runs).max(axis=-2, keepdims=True)
    best, codes, error = highest, np.zeros(runs.shape, np.int8), np.full(highest.shape, np.inf)
    for shrink in SHRINKS:
        peak = (shrink * highest).astype(np.float32)
        step = np.where(peak > 0, peak, 1) / largest
        rounded = np.clip(np.rint(runs / step), -largest, largest).astype(np.int8)
        missed = np.sum((rounded * step - runs) ** 2, axis=-2, keepdims=True)
        better = missed < error
        best, error = np.where(better, peak, best), np.where(better, missed, error)
        codes = np.where(better, rounded, codes)
    codes = codes.reshape(*matrix.shape[:-2], -1, matrix.shape[-1])[..., :rows, :]
    return Codes(codes if dtype == "int8" else _packed(codes), best[..., 0, :].astype(np.float32))


def _packed(codes: np.ndarray) -> np.ndarray:
    nibbles = (codes + 8).astype(np.uint8)
    padding = [(0, 0)] * (codes.ndim - 2) + [(0, codes.shape[-2] % 2), (0, 0)]
    nibbles = np.pad(nibbles, padding, constant_values=8)
    return nibbles[..., ::2, :] | nibbles[..., 1::2, :] << 4


@dataclasses.dataclass(frozen=True)
class FromCodes:
    """A stack of matrices [L, E, I, O] in files or in memory as `Codes`, read in slices as float32.

    What is read depends on nothing but the codes and peaks of its own run.
    """

    codes: Any  # OnDisk, or of NumPy, as are the peaks
    peaks: Any
    shape: tuple[int, ...]
    stored: str  # "int8" or "int4"
    group: int | None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """As it is stored."""
        return self.codes.nbytes + self.peaks.nbytes

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        *lead, rows, columns = (slice(r.start, r.stop) for r in ranges_of(part, self.shape))
        group = min(self.group or self.shape[-2], self.shape[-2])
        runs = slice(rows.start // group, -(-rows.stop // group))
        peaks = np.asarray(self.peaks[(*lead, runs, columns)]) / np.float32(LARGEST[self.stored])
        scales = np.repeat(peaks, group, axis=-2)
        first = rows.start - runs.start * group
        scales = scales[..., first : first + rows.stop - rows.start, :]
        return self._codes(tuple(lead), rows, columns).astype(np.float32) * scales

    def _codes(self, lead: tuple[slice, ...], rows: slice, columns: slice) -> np.ndarray:
        if self.stored == "int8":
            return np.asarray(self.codes[(*lead, rows, columns)])
        bytes_of_rows = slice(rows.start // 2, -(-rows.stop // 2))
        packed = np.asarray(self.codes[(*lead, bytes_of_rows, columns)])
        nibbles = np.stack([packed & 15, packed >> 4], axis=-2)
        codes = nibbles.reshape(*packed.shape[:-2], -1, packed.shape[-1]).astype(np.int8) - 8
        return codes[..., rows.start % 2 :, :][..., : rows.stop - rows.start, :]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[(slice(None),) * self.ndim], dtype)
