"""Batches: what a training step or an evaluation reads of several windows at once.

This file, and all that a step imports, runs without TFDS, grain and array_record: of these only the
reading of texts for training (`order.py`, `window_store.py`) knows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.data.windows import Window


class Batch(NamedTuple):
    """What a training step or an evaluation reads; with private units, [U, B, S] of each."""

    tokens: jax.Array  # int32 [B, S]
    targets: jax.Array  # int32 [B, S]: the next token of each
    segments: jax.Array  # int32 [B, S]: documents within a row; 0 is padding
    weights: jax.Array  # float32 [B, S]: 1 where there is something to predict, else 0

    @classmethod
    def of(cls, tokens: np.ndarray, segments: np.ndarray) -> "Batch":
        """From stacked windows: int32 [..., S + 1] each."""
        return cls(
            jnp.asarray(tokens[..., :-1]),
            jnp.asarray(tokens[..., 1:]),
            jnp.asarray(segments[..., :-1]),
            jnp.asarray(segments[..., 1:] > 0, jnp.float32),
        )


def stacked(some_windows: Iterator[Window], size: int) -> Iterator[Batch]:
    """All windows once, in order, in batches of `size`; the last one is filled with padding."""
    rows: list[Window] = []
    for window in some_windows:
        rows.append(window)
        if len(rows) == size:
            yield _stack(rows)
            rows = []
    if rows:
        blank = Window(np.zeros_like(rows[0].tokens), np.zeros_like(rows[0].segments))
        yield _stack(rows + [blank] * (size - len(rows)))


def _stack(rows: list[Window]) -> Batch:
    return Batch.of(np.stack([w.tokens for w in rows]), np.stack([w.segments for w in rows]))
