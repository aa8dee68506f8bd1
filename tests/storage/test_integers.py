"""Matrices as integers, against rounding number by number."""

import numpy as np
import pytest

from flexolmo_jax.storage.integers import LARGEST, FromCodes, stored_shapes, to_codes

FORMS = [("int8", None), ("int4", 8), ("int4", 5), ("int4", 64)]


def matrices(rows=21, columns=6):
    drawn = np.random.default_rng(0).standard_normal((2, 1, rows, columns)).astype(np.float32)
    drawn[1, 0, 8:16, 2] = 0  # a run of zeros
    return drawn


def read_back(matrix, dtype, group):
    stored = to_codes(matrix, dtype, group)
    assert (stored.codes.shape, stored.peaks.shape) == stored_shapes(matrix.shape, dtype, group)
    return FromCodes(*stored, matrix.shape, dtype, group)


def test_numbers_are_the_nearest_of_their_run():
    """With a grid of peaks that a loop tries too: every run is as near as the best of them."""
    for dtype, group in FORMS:
        matrix = matrices()
        found = np.asarray(read_back(matrix, dtype, group))
        size = group or matrix.shape[-2]
        for first in range(0, matrix.shape[-2], size):
            for column in range(matrix.shape[-1]):
                run = matrix[0, 0, first : first + size, column].astype(np.float64)
                errors = []
                for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
                    step = shrink * np.abs(run).max() / LARGEST[dtype]
                    codes = np.clip(np.rint(run / step), -LARGEST[dtype], LARGEST[dtype])
                    errors.append(np.sum((codes * step - run) ** 2))
                error = np.sum((found[0, 0, first : first + size, column] - run) ** 2)
                assert error == pytest.approx(min(errors), rel=1e-4, abs=1e-12)
        assert not found[1, 0, 8:16, 2].any() or group != 8


def test_integers_round_to_themselves():
    for dtype, group in FORMS:
        once = np.asarray(read_back(matrices(), dtype, group))
        np.testing.assert_allclose(
            np.asarray(read_back(once, dtype, group)), once, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(("dtype", "group"), FORMS)
def test_slices_are_those_of_the_whole(dtype, group):
    stored = read_back(matrices(), dtype, group)
    whole = np.asarray(stored)
    assert whole.shape == stored.shape and whole.dtype == stored.dtype == np.float32
    parts = [np.s_[0:1, :, 3:18, 2:5], np.s_[:, 0:1, 5:6, :], np.s_[:, :, 20:21, :],
             np.s_[:, :, 7:7, :], np.s_[1:2, :, 4:, :3]]  # fmt: skip
    for part in parts:
        np.testing.assert_array_equal(stored[part], whole[part])


def test_four_bits_are_half_a_byte():
    stored = read_back(matrices(rows=64, columns=32), "int4", 64)
    assert stored.codes.nbytes == 2 * 64 * 32 // 2
    assert stored.nbytes == stored.codes.nbytes + 2 * 32 * 4
