"""What a private run costs: epsilon and delta, by two accountants that know nothing of each other.

The unit of privacy and what is done to it are in `mechanism.py`. Here are only the numbers that
epsilon depends on. Adjacency is zero-out: two data sets are neighbours if the text of one unit is
nothing in the other, so that the number of units is the same, and may be known to everyone.
"""

import dataclasses
import importlib.metadata
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

try:
    import dp_accounting
except ImportError as error:
    raise ValueError(
        "differential privacy needs two more packages: in a clone of flexolmo_jax, run "
        "pip install -e '.[privacy]'"
    ) from error

from dp_accounting import dp_event, pld, rdp

logging.getLogger("absl").setLevel(logging.ERROR)  # it tells of every Renyi order it leaves out
ZERO_OUT = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
INTERVAL = (
    1e-3  # bins of privacy losses; ten times finer ones give 0.001 less, in ten times as long
)
LARGER = 1.25  # the largest batch is at least so many times the mean one: below, epsilon explodes
TRUNCATED = 0.01  # share of delta that batches cut at the largest size may use up
ROWS_SHARE = 0.3  # of epsilon for the router rows; budgets add about as squares, so it costs 5%
LOWEST = 0.2  # noise multiplier; below, the accountants take minutes and nothing is private


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """What a run does to private text, in the numbers that its epsilon depends on.

    Attributes:
      units: N, how many units there are to train on; public.
      mean_batch: each unit is in a step's batch with probability mean_batch / N, on its own.
      largest_batch: where more were drawn, so many of them, at random, stay in the batch.
      steps: of training.
      noise_multiplier: standard deviation of a step's noise, over the most a unit can add.
      rows_noise_multiplier: the same of the one release that the router rows are fitted to, which
        all units take part in; None where there is none.
    """

    units: int
    mean_batch: int
    largest_batch: int
    steps: int
    noise_multiplier: float
    rows_noise_multiplier: float | None = None

    def __post_init__(self):
        if not 0 < self.mean_batch <= min(self.units, self.largest_batch):
            raise ValueError(
                f"a mean batch must hold between 1 and all {self.units} units, and no more than "
                f"the largest batch, {self.largest_batch}; found {self.mean_batch}"
            )
        for name in ("noise_multiplier", "rows_noise_multiplier"):
            found = getattr(self, name)
            if found is not None and not LOWEST <= found < math.inf:
                raise ValueError(f"{name} must be at least {LOWEST}, found {found}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, found {self.steps}")

    @property
    def sampling_probability(self) -> float:
        return self.mean_batch / self.units

    @property
    def truncation(self) -> float:
        """At most the probability that any batch of the run is cut at the largest size."""
        tail = stats.binom.sf(self.largest_batch, self.units, self.sampling_probability)
        return min(1.0, self.steps * float(tail))


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Of all of the mechanisms together, from privacy loss distributions; an upper bound."""
    accountant = pld.PLDAccountant(ZERO_OUT, INTERVAL)
    for one in mechanisms:
        accountant.compose(_event(one, truncated=True))
    return accountant.get_epsilon(delta)


def renyi_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """The same from Renyi divergences: another upper bound, and a looser one.

    This accountant knows Poisson batches, but not truncated ones. A run with truncated batches
    differs from one without with probability t (`Mechanism.truncation`), so that (e, d) of the
    latter is (e, d + t * (1 + exp(e))) of the former.

    Returns:
      epsilon; infinity if so little of delta would not be enough for t.
    """
    accountant = rdp.RdpAccountant(neighboring_relation=ZERO_OUT)
    for one in mechanisms:
        accountant.compose(_event(one, truncated=False))
    found = accountant.get_epsilon(delta * (1 - TRUNCATED))
    truncation = sum(one.truncation for one in mechanisms)
    enough = truncation == 0 or math.log(truncation) + np.logaddexp(0, found) <= math.log(
        delta * TRUNCATED
    )
    return found if enough else math.inf


def _event(mechanism: Mechanism, truncated: bool) -> dp_event.DpEvent:
    noise, probability = mechanism.noise_multiplier, mechanism.sampling_probability
    one: dp_event.DpEvent
    if truncated:
        one = dp_event.TruncatedSubsampledGaussianDpEvent(
            dataset_size=mechanism.units,
            sampling_probability=probability,
            truncated_batch_size=mechanism.largest_batch,
            noise_multiplier=noise,
        )
    else:
        one = dp_event.PoissonSampledDpEvent(probability, dp_event.GaussianDpEvent(noise))
    parts: list[Any] = []
    if mechanism.steps:
        parts.append(dp_event.SelfComposedDpEvent(one, mechanism.steps))
    if mechanism.rows_noise_multiplier is not None:
        parts.append(dp_event.GaussianDpEvent(mechanism.rows_noise_multiplier))
    return dp_event.ComposedDpEvent(parts)


def calibrate(
    target: float,
    delta: float,
    *,
    units: int,
    mean_batch: int,
    steps: int,
    rows: bool,
    multiple: int,
) -> Mechanism:
    """The run with the least noise whose epsilon, by `epsilon`, is not above a target.

    Args:
      target, delta: the budget of the whole run.
      units, mean_batch, steps: as in `Mechanism`.
      rows: whether router rows are fitted to a release of their own.
      multiple: of which the largest batch must be one.

    Raises:
      ValueError: a mean batch would be larger than the data.
    """
    if mean_batch > units:
        raise ValueError(
            f"data.batch_size={mean_batch} is the mean number of units in a batch, and there are "
            f"only {units} units to train on; make it smaller"
        )
    rows_noise = None
    if rows:
        rows_noise = _up(dp_accounting.get_sigma_gaussian(ROWS_SHARE * target, delta))
        rows_noise = max(LOWEST, rows_noise)
    largest = largest_batch(target, delta, units, mean_batch, steps, multiple)

    def make(noise: float) -> Mechanism:
        return Mechanism(units, mean_batch, largest, steps, noise, rows_noise)

    def find(accountant: Callable, truncated: bool, bracket: Any) -> float:
        return dp_accounting.calibrate_dp_mechanism(
            accountant,
            lambda noise: _event(make(noise), truncated),
            target,
            delta,
            bracket,
            tol=1e-3,
        )

    if renyi_epsilon([make(LOWEST)], delta) <= target:
        return make(LOWEST)
    start = dp_accounting.LowerEndpointAndGuess(LOWEST, 1.0)
    rough = find(lambda: rdp.RdpAccountant(neighboring_relation=ZERO_OUT), False, start)  # quick
    near = dp_accounting.LowerEndpointAndGuess(0.6 * rough, rough)
    return make(_up(find(lambda: pld.PLDAccountant(ZERO_OUT, INTERVAL), True, near)))


def largest_batch(
    epsilon: float, delta: float, units: int, mean_batch: int, steps: int, multiple: int
) -> int:
    """The smallest safe one: for both accountants, batches that are cut cost next to nothing.

    It is a multiple of `multiple`, and at least LARGER times the mean batch.
    """
    size = math.ceil(LARGER * mean_batch)
    # Renyi epsilon, which is larger, must find it safe too: twice epsilon, and one, leaves room.
    allowed = math.log(TRUNCATED * delta / steps) - np.logaddexp(0, 2 * epsilon + 1)
    while size < units and stats.binom.logsf(size, units, mean_batch / units) > allowed:
        size += 1
    return -(-size // multiple) * multiple


def default_delta(units: int) -> float:
    """A tenth of a unit, and at most 1e-5."""
    return min(1e-5, 0.1 / units)


def versions() -> str:
    """The accountants' package and version."""
    return f"dp_accounting {importlib.metadata.version('dp-accounting')}"


def _up(value: float) -> float:
    """To four decimals: more noise, not less."""
    return math.ceil(value * 1e4) / 1e4
