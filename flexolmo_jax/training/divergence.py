"""Stops a run that breaks down: a loss that is not finite, or far above what it was."""

import json
import math
from collections import deque
from pathlib import Path

import numpy as np

from flexolmo_jax.data.batches import window_numbers
from flexolmo_jax.data.window_store import SourceWindows
from flexolmo_jax.storage.files import replace_file

SEEN = 50  # steps before a loss can be called a spike


class LossMonitor:
    """Looks at every step's loss, in order.

    A spike is a loss more than 10 standard deviations, and more than half, above the mean of the
    last 50 steps' of this process. A run that is resumed after one goes past it, since nothing is
    called a spike in its first 50 steps.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SEEN)

    def breakdown(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, if anything is."""
        if not math.isfinite(loss + grad_norm):
            return "the loss or its gradient is not finite"
        before = self._losses
        if len(before) == SEEN:
            mean = float(np.mean(before))
            if loss > 1.5 * mean and loss > mean + 10 * float(np.std(before)):
                return f"the loss is {loss:.3g}, after a mean of {mean:.3g} over {SEEN} steps"
        before.append(loss)
        return None


def record_divergence(file: Path, source: SourceWindows, seed: int, step: int, why: str) -> None:
    """Writes down the step, and where the documents of its batch are; for the owner's eyes."""
    documents = source.documents_of(window_numbers(source, seed, step))
    replace_file(file, json.dumps({"step": step, "why": why, "documents": documents}, indent=1))
