"""Batches: batch i is a pure function of (seed, i), so a step number is all there is to resume."""

from collections.abc import Iterator
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.data.flexmix import SourceWindows
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


def batches(source: SourceWindows, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless training batches from number `start` on, each epoch in another order."""
    order = _order(grain.MapDataset.source(source.as_data_source("train")), source, seed)[start:]
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    for batch in order.to_iter_dataset(read):
        yield Batch.of(batch["tokens"], batch["segments"])


def window_numbers(source: SourceWindows, seed: int, step: int) -> list[int]:
    """Which of a source's windows the batch of a step (from 1) holds."""
    windows = grain.MapDataset.range(len(source.as_data_source("train")))
    return _order(windows, source, seed)[step - 1].tolist()


def _order(windows: grain.MapDataset, source: SourceWindows, seed: int) -> grain.MapDataset:
    return windows.shuffle(seed).repeat().batch(source.data.batch_size)


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
