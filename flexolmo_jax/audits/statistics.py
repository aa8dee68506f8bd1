"""Rates and areas with their intervals, at 95% confidence."""

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000  # bootstrap samples for the interval of an area


class Rate(NamedTuple):
    """A rate of independent trials, with the exact Clopper-Pearson interval."""

    hits: int
    of: int
    rate: float
    low: float
    high: float

    @classmethod
    def of_counts(cls, hits: int, of: int) -> "Rate":
        found = stats.binomtest(hits, of).proportion_ci(CONFIDENCE, method="exact")
        return cls(hits, of, hits / of, float(found.low), float(found.high))

    def __str__(self) -> str:
        return f"{self.rate:.2%} ({self.low:.2%} to {self.high:.2%})"


class Area(NamedTuple):
    """Area under the ROC curve: the probability that a member scores above a non-member."""

    area: float
    low: float
    high: float

    @classmethod
    def of_scores(cls, members: np.ndarray, others: np.ndarray) -> "Area":
        """The area by ranks; ties count half. The interval bootstraps both groups."""
        generator = np.random.default_rng(0)  # used for the interval only
        drawn = [
            _area(generator.choice(members, len(members)), generator.choice(others, len(others)))
            for _ in range(RESAMPLES)
        ]
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return cls(_area(members, others), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.area:.3f} ({self.low:.3f} to {self.high:.3f})"


def _area(members: np.ndarray, others: np.ndarray) -> float:
    ranks = stats.rankdata(np.concatenate([members, others]))[: len(members)]
    above = ranks.sum() - len(members) * (len(members) + 1) / 2
    return float(above / (len(members) * len(others)))


def as_json(value: Any) -> Any:
    """Converts named tuples to objects, recursively."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: as_json(item) for key, item in value._asdict().items()}
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value
