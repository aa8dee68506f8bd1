"""The order of training: batch i is a pure function of (seed, i); a run resumes from a number."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
from grain.experimental import index_shuffle

from flexolmo_jax.data.batches import Batch
from flexolmo_jax.data.seeds import derived_seed
from flexolmo_jax.data.window_store import SourceWindows


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
