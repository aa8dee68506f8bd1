"""Detects a run that diverges: a loss that is not finite, or far above the recent losses."""

import json
import math
from collections import deque
from pathlib import Path

import numpy as np

from flexolmo_jax.data.order import window_numbers
from flexolmo_jax.data.window_store import SourceWindows
from flexolmo_jax.storage.files import replace_file

RECENT_LOSSES = 50  # fewer are not enough to call a loss a spike


class LossMonitor:
    """Checks the loss of every step, in order.

    A spike is a loss that is more than 10 standard deviations and more than 50% above the mean of
    the last 50 losses of this process. A run that is resumed after a spike passes it, because the
    first 50 losses of a process are never spikes.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=RECENT_LOSSES)

    def divergence(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, or None."""
        if not math.isfinite(loss + grad_norm):
            return "the loss or its gradient is not finite"
        recent = self._losses
        if len(recent) == RECENT_LOSSES:
            mean = float(np.mean(recent))
            if loss > 1.5 * mean and loss > mean + 10 * float(np.std(recent)):
                return (
                    f"the loss is {loss:.3g}, after a mean of {mean:.3g} over {RECENT_LOSSES} steps"
                )
        recent.append(loss)
        return None


def record_divergence(file: Path, source: SourceWindows, seed: int, step: int, why: str) -> None:
    """Writes the step and the locations of its documents to a file, for the owner."""
    documents = source.documents_of(window_numbers(source, seed, step))
    replace_file(file, json.dumps({"step": step, "why": why, "documents": documents}, indent=1))
