"""How far routing mass and the counterfactual agree, on answers that have both."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
FEWEST = 10  # answers, below which an interval would say nothing


class Answer(NamedTuple):
    """One answer.

    Attributes:
      mass: tokens by owner.
      bits: the counterfactual by owner, in bits per token (counterfactual.py).
    """

    mass: dict[str, float]
    bits: dict[str, float]

    def share(self, owner: str) -> float:
        """An owner's part of the mass, 0 to 1."""
        return self.mass[owner] / sum(self.mass.values())


class Estimate(NamedTuple):
    """A value and its 95% interval, by bootstrap over answers."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


class Agreement(NamedTuple):
    """How far mass and counterfactual agree.

    Attributes:
      answers: how many.
      rank_correlation: Spearman's, of share and bits over all pairs of an answer and an owner.
      same_first: how often the owner with the most mass also has the largest counterfactual.
      negative: the part of all shares that is of owners whose expert made the answer less likely.
    """

    answers: int
    rank_correlation: Estimate
    same_first: Estimate
    negative: Estimate


def agreement(answers: Sequence[Answer]) -> Agreement | None:
    """How far they agree.

    Returns:
      None with fewer than 10 answers in which an owner could be left out, or if their shares or
      their bits are all the same.
    """
    answers = [answer for answer in answers if len(answer.bits) > 1]
    if len(answers) < FEWEST:
        return None
    owners = sorted({owner for answer in answers for owner in answer.bits})
    shares, bits = np.full((2, len(answers), len(owners)), np.nan)
    for row, answer in enumerate(answers):
        for owner, own in answer.bits.items():
            column = owners.index(owner)
            shares[row, column], bits[row, column] = answer.share(owner), own

    def estimate(of: Callable[[np.ndarray, np.ndarray], float]) -> Estimate:
        draw = np.random.default_rng(0)
        drawn = draw.integers(len(answers), size=(RESAMPLES, len(answers)))
        values = [of(shares[rows], bits[rows]) for rows in drawn]
        low, high = np.nanquantile(values, (0.025, 0.975))
        return Estimate(of(shares, bits), float(low), float(high))

    if np.isnan(_correlation(shares, bits)):
        return None
    return Agreement(
        len(answers), estimate(_correlation), estimate(_same_first), estimate(_negative)
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors; equal values share their mean rank.

    NaN if one of them is constant.
    """
    x, y = _ranks(x), _ranks(y)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else float("nan")


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _correlation(shares: np.ndarray, bits: np.ndarray) -> float:
    known = ~np.isnan(bits)
    return spearman(shares[known], bits[known])


def _same_first(shares: np.ndarray, bits: np.ndarray) -> float:
    return float(np.mean(np.nanargmax(shares, axis=1) == np.nanargmax(bits, axis=1)))


def _negative(shares: np.ndarray, bits: np.ndarray) -> float:
    return float(np.sum(shares[bits < 0]) / np.nansum(shares))
