"""Batches: batch i is a pure function of (seed, i), so resuming needs only a step number."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from grain.experimental import index_shuffle

from flexolmo_jax.data.seeds import derived_seed
from flexolmo_jax.data.window_store import SourceWindows
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
    """Endless training batches from number `start` on, each epoch in another order.

    No epoch of a seed has the order of an epoch of another seed, or of another epoch.
    """
    order = _order(source.as_data_source("train"), source, seed)[start:]
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    for batch in order.to_iter_dataset(read):
        yield Batch.of(batch["tokens"], batch["segments"])


def window_numbers(source: SourceWindows, seed: int, step: int) -> list[int]:
    """Which of a source's windows the batch of a step (from 1) holds."""
    numbers = range(len(source.as_data_source("train")))
    return _order(numbers, source, seed)[step - 1].tolist()


def _order(windows: Sequence[Any], source: SourceWindows, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(_Epochs(windows, seed)).batch(source.data.batch_size)


class _Epochs:
    """Windows, epoch after epoch, each in an order of its own; with random access.

    Grain's own `shuffle(seed).repeat()` gives epoch e of seed s the order of epoch 0 of seed s + e.
    """

    def __init__(self, windows: Sequence[Any], seed: int):
        self._windows, self._seed = windows, seed

    def __len__(self) -> int:
        return sys.maxsize  # without end

    def __getitem__(self, index: int) -> Any:
        count = len(self._windows)
        epoch, place = divmod(index, count)
        seed = derived_seed(self._seed, epoch)
        return self._windows[index_shuffle(place, max_index=count - 1, seed=seed, rounds=4)]


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
