"""Log-probabilities of the tokens of many sequences, in one pass over them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.inference.sampling import Sampling
from flexolmo_jax.model import FlexOlmo

ROWS = 16  # sequences per batch
BUCKET = 64  # lengths are rounded up to a multiple, so that few shapes compile


class Scores(NamedTuple):
    """Of each token of a sequence but the first, given the tokens before it."""

    logs: np.ndarray  # float32 [tokens - 1]: log-probabilities
    likeliest: np.ndarray  # bool [tokens - 1]: whether greedy decoding would choose it

    @property
    def nats(self) -> float:
        """Negative log-likelihood of the sequence."""
        return -float(self.logs.sum(dtype=np.float64))


def scores(
    model: FlexOlmo,
    sequences: Sequence[Sequence[int]],
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    sampling: Sampling | None = None,
) -> list[Scores]:
    """Scores sequences with a model.

    Args:
      model: the model to ask.
      sequences: ids, at least two each; of any lengths.
      without, only: experts to switch off, or the only ones to use.
      sampling: score under this truncated distribution, in which a log-probability may be -inf;
        None: under the model's own.
    """
    found = []
    for first in range(0, len(sequences), ROWS):
        batch = sequences[first : first + ROWS]
        arrays = model.log_likelihoods(padded(batch), without=without, only=only, sampling=sampling)
        for ids, *row in zip(batch, *arrays, strict=False):
            scores = [np.asarray(values[: len(ids) - 1, 0]) for values in row]
            found.append(Scores(*scores))
    return found


def tokenizer_of(model: FlexOlmo) -> Tokenizer:
    """Raises ValueError if the model came without one."""
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer.json, so text cannot be audited")
    return model.tokenizer


def padded(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [ROWS, S + 1], padded on the right, where no token before attends."""
    length = -(-(max(map(len, sequences)) - 1) // BUCKET) * BUCKET
    rows = np.zeros((ROWS, length + 1), np.int32)
    for row, ids in zip(rows, sequences, strict=False):
        row[: len(ids)] = ids
    return rows
