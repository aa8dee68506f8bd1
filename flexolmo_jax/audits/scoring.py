"""What a model thinks of given tokens: log-probabilities of each, in one pass."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.inference.sampling import Sampling, candidates
from flexolmo_jax.model import FlexOlmo

ROWS = 16  # sequences that are read together
BUCKET = 64  # lengths are rounded up to it, so that few shapes are compiled


class Scores(NamedTuple):
    """Of each token of a sequence but the first, given those before it."""

    logs: np.ndarray  # float32 [tokens - 1]: log-probabilities
    likeliest: np.ndarray  # bool [tokens - 1]: greedy decoding would have chosen it

    @property
    def nats(self) -> float:
        """What the whole sequence costs."""
        return -float(self.logs.sum(dtype=np.float64))


def scores(
    model: FlexOlmo,
    sequences: Sequence[Sequence[int]],
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    sampling: Sampling | None = None,
) -> list[Scores]:
    """What a model thinks of sequences.

    Args:
      model: to ask.
      sequences: ids, at least two each; of any lengths.
      without, only: experts to switch off, or the only ones to use.
      sampling: of what would be drawn in this way, -inf where that is never; None: of all tokens.
    """
    found = []
    for first in range(0, len(sequences), ROWS):
        some = sequences[first : first + ROWS]
        rows = padded(some)
        logits = model.logits(rows[:, :-1], without=without, only=only)
        both = (np.asarray(x) for x in _of_targets(logits, rows[:, 1:], sampling))
        for ids, *row in zip(some, *both, strict=False):
            found.append(Scores(*(values[: len(ids) - 1] for values in row)))
    return found


def tokenizer_of(model: FlexOlmo) -> Tokenizer:
    """Raises ValueError if the model came without one."""
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer.json, so text cannot be audited")
    return model.tokenizer


def padded(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [ROWS, S + 1], zeros on the right, where nothing before looks at them."""
    length = -(-(max(map(len, sequences)) - 1) // BUCKET) * BUCKET
    rows = np.zeros((ROWS, length + 1), np.int32)
    for row, ids in zip(rows, sequences, strict=False):
        row[: len(ids)] = ids
    return rows


@functools.partial(jax.jit, static_argnames="sampling")
def _of_targets(
    logits: jax.Array, targets: jax.Array, sampling: Sampling | None
) -> tuple[jax.Array, jax.Array]:
    """[B, S, V], [B, S] -> [B, S] each."""
    likeliest = jnp.argmax(logits, axis=-1) == targets
    if sampling is None:
        every = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0], likeliest
    values, tokens = candidates(logits, sampling)
    return jnp.max(jnp.where(tokens == targets[..., None], values, -jnp.inf), axis=-1), likeliest
