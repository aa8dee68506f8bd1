"""What a private run costs: epsilon and delta, by two independent accountants.

`mechanism.py` defines the unit of privacy and what is done to it; this file holds only the numbers
that epsilon depends on. Adjacency is zero-out: two data sets are neighbours if one unit's text is
empty in the other, so the number of units is the same in both and may be public.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

try:
    import dp_accounting
except ImportError as error:
    raise ValueError(
        "differential privacy needs two more packages: in a clone of flexolmo_jax, run "
        "pip install -e '.[privacy]'"
    ) from error

from dp_accounting import dp_event, pld, rdp
from dp_accounting.pld import pld_pmf, privacy_loss_distribution, privacy_loss_mechanism

logging.getLogger("absl").setLevel(logging.ERROR)  # it logs every Renyi order that it skips
ZERO_OUT = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
# The grid of privacy losses. Rounding every step's loss to the grid adds a sixth of the squared
# interval to its variance. A run of T steps has a standard deviation of about a fifth of epsilon,
# so an interval of this share of epsilon / sqrt(T) overstates epsilon by about 0.3%.
INTERVAL_SHARE = 0.03
MAX_INTERVAL = 1e-3
# Points of one step's grid, summed over all runs: about one second for each epsilon.
MAX_GRID_POINTS = 100_000
# Losses above the grid count as infinite. dp-accounting's default leaves a probability of exp(-50)
# above it; where such a grid would be too coarse, a shorter one may use up this share of delta.
LOG_TAIL_MASS = -50.0
TAIL_SHARE_OF_DELTA = 1e-4
# dp-accounting stores grids of up to 1,000 points in another form, and raises their size to the
# power of the number of steps: an integer of a million digits. Grids of long runs are padded.
PADDED_STEPS, PADDED_POINTS = 1000, 1001
MAX_STEPS = 10**7  # of all runs together; beyond, rounding errors of the FFT reach delta
MAX_RUNS = 200  # whose steps differ; 200 take 13 seconds, 300 may take more than 20
MAX_UNITS = 10**12
TRUNCATION_SHARE_OF_DELTA = 0.01  # what batches truncated at the largest size may use up
MIN_NOISE = 0.2  # noise multiplier; below, the accountants take minutes and nothing is private
MAX_NOISE = 1e9  # noise multiplier; above, the accountants' numbers are meaningless


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """What a run does to private text, in the numbers that its epsilon depends on.

    Attributes:
      units: N, the number of units to train on; public.
      mean_batch: each unit joins a step's batch independently with probability mean_batch / N.
      largest_batch: a batch that draws more units keeps a random subset of this size.
      steps: of training.
      noise_multiplier: standard deviation of a step's noise, divided by the largest contribution
        of a unit.
      rows_noise_multiplier: the same for the single release that the router rows are fitted to, in
        which all units take part; None without such a release.
    """

    units: int
    mean_batch: int
    largest_batch: int
    steps: int
    noise_multiplier: float
    rows_noise_multiplier: float | None = None

    def __post_init__(self):
        for name in ("units", "mean_batch", "largest_batch", "steps"):
            found = getattr(self, name)
            if not isinstance(found, int) or isinstance(found, bool):
                raise ValueError(f"{name} must be a whole number, found {found!r}")
        if not 0 < self.units <= MAX_UNITS:
            raise ValueError(f"units must be from 1 to {MAX_UNITS:,}, found {self.units}")
        if not 0 < self.mean_batch <= min(self.units, self.largest_batch):
            raise ValueError(
                f"a mean batch must hold between 1 and all {self.units} units, and no more than "
                f"the largest batch, {self.largest_batch}; found {self.mean_batch}"
            )
        if self.largest_batch > 2 * MAX_UNITS:
            raise ValueError(f"largest_batch is {self.largest_batch}, more than any text has units")
        for name in ("noise_multiplier", "rows_noise_multiplier"):
            found = getattr(self, name)
            if found is None and name == "rows_noise_multiplier":
                continue
            if not isinstance(found, int | float) or isinstance(found, bool):
                raise ValueError(f"{name} must be a number, found {found!r}")
            if not MIN_NOISE <= found <= MAX_NOISE:
                raise ValueError(f"{name} must be at least {MIN_NOISE}, found {found}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, found {self.steps}")
        if self.steps > MAX_STEPS:
            raise ValueError(
                f"steps must be at most {MAX_STEPS:,}, the accountants' limit; found {self.steps}"
            )

    @property
    def sampling_probability(self) -> float:
        return self.mean_batch / self.units

    @property
    def truncation(self) -> float:
        """An upper bound of the probability that any batch of the run is truncated."""
        tail = stats.binom.sf(self.largest_batch, self.units, self.sampling_probability)
        return min(1.0, self.steps * float(tail))


class Grid(NamedTuple):
    """The points on which privacy loss distributions are discretized."""

    interval: float  # between two points
    log_tail_mass: float  # log of the probability, per step, that a loss is above the grid


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of all mechanisms together: the smaller of two upper bounds.

    Both accountants prove their bounds, so the smaller one holds. It is nearly always that of
    privacy loss distributions.

    Raises:
      ValueError: there are more runs or steps than the accountants can handle.
    """
    renyi = renyi_epsilon(mechanisms, delta)
    return min(renyi, pld_epsilon(mechanisms, delta, renyi))


def pld_epsilon(mechanisms: Sequence[Mechanism], delta: float, guess: float | None = None) -> float:
    """An upper bound from privacy loss distributions, on a grid chosen by steps and epsilon.

    Args:
      mechanisms, delta: as in `epsilon`.
      guess: an estimate of the result; None asks the Renyi accountant.

    Returns:
      epsilon; infinity if no epsilon belongs to this delta.

    Raises:
      ValueError: there are more runs or steps than the accountants can handle.
    """
    counted = _counted(mechanisms)
    guess = renyi_epsilon(mechanisms, delta) if guess is None else guess
    grid = choose_grid(counted, delta, guess)
    while True:  # a guess that is far too high gives a grid that is too coarse
        found = epsilon_on_grid(counted, delta, grid)
        finer = choose_grid(counted, delta, found)
        if finer.interval > 0.7 * grid.interval:
            return found
        grid = finer


def _counted(mechanisms: Sequence[Mechanism]) -> dict[Mechanism, int]:
    """All steps and releases of some runs: mechanisms, and how often each is used.

    Runs with equal steps, such as interrupted runs or ones with another learning rate, count as one
    longer run, because composition does not depend on order. Releases for router rows are separate.

    Raises:
      ValueError: there are more runs or steps than the accountants can handle.
    """
    steps: collections.Counter[Mechanism] = collections.Counter()
    releases: collections.Counter[Mechanism] = collections.Counter()
    for run, times in collections.Counter(mechanisms).items():
        steps[dataclasses.replace(run, steps=0, rows_noise_multiplier=None)] += run.steps * times
        if run.rows_noise_multiplier is not None:
            releases[dataclasses.replace(run, steps=0)] += times
    different = max(len(steps), len(releases))
    if different > MAX_RUNS or steps.total() > MAX_STEPS:
        raise ValueError(
            f"expected at most {MAX_RUNS:,} runs whose noise or batches differ, and {MAX_STEPS:,} "
            f"steps in all, the accountants' limits; found {different:,} and {steps.total():,}"
        )
    longer = {dataclasses.replace(run, steps=count): 1 for run, count in steps.items()}
    return longer | dict(releases)


def choose_grid(counted: dict[Mechanism, int], delta: float, guess: float) -> Grid:
    """The grid for runs whose epsilon is about `guess`.

    Args:
      counted: mechanisms, and how often each is used.
      delta: of the guarantee.
      guess: an estimate of epsilon.
    """
    releases = sum(
        (run.steps + (run.rows_noise_multiplier is not None)) * times
        for run, times in counted.items()
    )
    wanted = min(MAX_INTERVAL, INTERVAL_SHARE * guess / math.sqrt(max(1, releases)))
    default = _widest(counted, LOG_TAIL_MASS) / MAX_GRID_POINTS
    if default <= wanted:
        return Grid(wanted, LOG_TAIL_MASS)
    # Small sampling probabilities: the grid must reach the rare, large losses of a sampled unit.
    draws = sum(run.steps * times * run.sampling_probability for run, times in counted.items())
    tail = math.log(TAIL_SHARE_OF_DELTA * delta / max(draws, 1.0))
    tail = max(LOG_TAIL_MASS, tail)
    return Grid(max(wanted, _widest(counted, tail) / MAX_GRID_POINTS), tail)


def _widest(counted: dict[Mechanism, int], log_tail_mass: float) -> float:
    """The sum of the runs' largest losses of a step; before any step, the largest of them."""
    losses = [_largest_loss(run, log_tail_mass) for run in counted if run.steps]
    return sum(losses) or max(_largest_loss(run, log_tail_mass) for run in counted)


def _largest_loss(mechanism: Mechanism, log_tail_mass: float) -> float:
    """The loss of one step that is exceeded with a probability of exp(log_tail_mass) only."""
    noise, probability = mechanism.noise_multiplier, mechanism.sampling_probability
    deviations = 10.1
    if log_tail_mass > LOG_TAIL_MASS:
        deviations = -float(stats.norm.ppf(0.5 * math.exp(log_tail_mass)))
    loss = deviations / noise + 0.5 / noise**2  # of a unit that is in the batch
    if loss < 1e-2:
        return math.log1p(probability * math.expm1(loss))
    absent = math.log1p(-probability) if probability < 1 else -math.inf
    return float(np.logaddexp(absent, math.log(probability) + loss))


def epsilon_on_grid(counted: dict[Mechanism, int], delta: float, grid: Grid) -> float:
    """Epsilon with untruncated batches, plus what truncation can change (see `renyi_epsilon`).

    Where truncation would use up more than a small share of delta, dp-accounting's own, slower
    account of truncated batches is used instead.

    Args:
      counted, delta: as in `choose_grid`.
      grid: where losses are rounded up to.
    """
    with np.errstate(over="ignore"):  # in SciPy's logarithms of sums, of bounds that are not used
        losses = _losses(counted, grid)
    truncation = sum(run.truncation * times for run, times in counted.items())

    def delta_of(epsilon: float) -> float:
        return losses.get_delta_for_epsilon(epsilon) + truncation * (
            1 + math.exp(min(epsilon, 700))
        )

    found = _solved(delta_of, delta)
    used = truncation and truncation * (1 + math.exp(min(found, 700)))
    if used > TRUNCATION_SHARE_OF_DELTA * delta:
        widest = sum(20.2 / run.noise_multiplier + 2 / run.noise_multiplier**2 for run in counted)
        accountant = pld.PLDAccountant(ZERO_OUT, max(grid.interval, widest / MAX_GRID_POINTS))
        for run, times in counted.items():
            accountant.compose(_event(run, truncated=True), times)
        return _solved(accountant.get_delta, delta)
    return found


def _losses(
    counted: dict[Mechanism, int], grid: Grid
) -> privacy_loss_distribution.PrivacyLossDistribution:
    """The distribution of all privacy losses together, with untruncated batches."""
    gaussian = functools.partial(
        privacy_loss_distribution.from_gaussian_mechanism,
        value_discretization_interval=grid.interval, neighboring_relation=ZERO_OUT,
    )  # fmt: skip
    total = privacy_loss_distribution.identity(value_discretization_interval=grid.interval)
    for run, times in counted.items():
        if run.steps:
            reach = _largest_loss(run, grid.log_tail_mass)
            if run.steps * times > PADDED_STEPS and 3 * reach < PADDED_POINTS * grid.interval:
                step = _padded(run, grid)
            else:
                step = gaussian(
                    run.noise_multiplier, sampling_prob=run.sampling_probability,
                    log_mass_truncation_bound=grid.log_tail_mass,
                )  # fmt: skip
            total = total.compose(step.self_compose(run.steps * times))
        if run.rows_noise_multiplier is not None:
            total = total.compose(gaussian(run.rows_noise_multiplier / math.sqrt(times)))
    return total


def _padded(run: Mechanism, grid: Grid) -> privacy_loss_distribution.PrivacyLossDistribution:
    """The losses of one step on at least PADDED_POINTS points; the added ones are empty."""

    def losses(adjacency: privacy_loss_mechanism.AdjacencyType) -> pld_pmf.PLDPmf:
        gaussian = privacy_loss_mechanism.GaussianPrivacyLoss(
            run.noise_multiplier, sampling_prob=run.sampling_probability, adjacency_type=adjacency,
            log_mass_truncation_bound=grid.log_tail_mass,
        )  # fmt: skip
        bounds = gaussian.connect_dots_bounds()
        first = math.floor(bounds.epsilon_lower / grid.interval)
        last = max(math.ceil(bounds.epsilon_upper / grid.interval), first + PADDED_POINTS)
        deltas = gaussian.get_delta_for_epsilon(np.arange(first, last + 1) * grid.interval)
        return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
            grid.interval, first, last, deltas
        )

    both = privacy_loss_mechanism.AdjacencyType
    return privacy_loss_distribution.PrivacyLossDistribution(losses(both.REMOVE), losses(both.ADD))


def _solved(delta_of: Callable[[float], float], delta: float) -> float:
    """The smallest epsilon at which delta is small enough; infinity if there is none."""

    def excess(epsilon: float) -> float:
        return math.log(max(delta_of(epsilon), 1e-300)) - math.log(delta)

    upper = 1.0
    while excess(upper) > 0:
        upper *= 2
        if upper > 1e4:
            return math.inf
    if excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, upper, xtol=1e-9, rtol=1e-9))


def renyi_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """A second, looser upper bound of epsilon, from Renyi divergences.

    This accountant handles Poisson batches, but not truncated ones. A run with truncated batches
    differs from one without with probability t (`Mechanism.truncation`), so (e, d) of the latter
    is (e, d + t * (1 + exp(e))) of the former.

    Returns:
      epsilon; infinity if truncation needs more than its share of delta.

    Raises:
      ValueError: there are more runs or steps than the accountants can handle.
    """
    counted = _counted(mechanisms)
    accountant = rdp.RdpAccountant(neighboring_relation=ZERO_OUT)
    for run, times in counted.items():
        accountant.compose(_event(run, truncated=False), times)
    found = accountant.get_epsilon(delta * (1 - TRUNCATION_SHARE_OF_DELTA))
    truncation = sum(run.truncation * times for run, times in counted.items())
    enough = truncation == 0 or math.log(truncation) + np.logaddexp(0, found) <= math.log(
        delta * TRUNCATION_SHARE_OF_DELTA
    )
    return found if enough else math.inf


def _event(mechanism: Mechanism, truncated: bool) -> dp_event.DpEvent:
    noise, probability = mechanism.noise_multiplier, mechanism.sampling_probability
    step: dp_event.DpEvent
    if truncated:
        step = dp_event.TruncatedSubsampledGaussianDpEvent(
            dataset_size=mechanism.units,
            sampling_probability=probability,
            truncated_batch_size=mechanism.largest_batch,
            noise_multiplier=noise,
        )
    else:
        step = dp_event.PoissonSampledDpEvent(probability, dp_event.GaussianDpEvent(noise))
    parts: list[Any] = []
    if mechanism.steps:
        parts.append(dp_event.SelfComposedDpEvent(step, mechanism.steps))
    if mechanism.rows_noise_multiplier is not None:
        parts.append(dp_event.GaussianDpEvent(mechanism.rows_noise_multiplier))
    return dp_event.ComposedDpEvent(parts)


def versions() -> str:
    """The accountants' package and version."""
    return f"dp_accounting {importlib.metadata.version('dp-accounting')}"
