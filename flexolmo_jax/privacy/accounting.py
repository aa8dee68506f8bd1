"""What a private run costs: epsilon and delta, by two accountants that know nothing of each other.

The unit of privacy and what is done to it are in `mechanism.py`. Here are only the numbers that
epsilon depends on. Adjacency is zero-out: two data sets are neighbours if the text of one unit is
nothing in the other, so that the number of units is the same, and may be known to everyone.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

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

logging.getLogger("absl").setLevel(logging.ERROR)  # it tells of every Renyi order it leaves out
ZERO_OUT = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
# The grid of privacy losses. Every step's loss is put on its points, which adds a sixth of the
# squared interval to the variance. A run of T steps has a standard deviation of about a fifth of
# epsilon, so that with this share of epsilon / sqrt(T) epsilon is overstated by about 0.3%.
FINENESS = 0.03
COARSEST = 1e-3
POINTS = 30_000  # of the grid of one step, for all runs together: what a second or two allow
# dp-accounting holds grids of up to 1,000 points in another form, whose size it raises to the power
# of the number of steps: a whole number of a million digits. Grids of long runs are made larger.
LONG, LEAST_POINTS = 1000, 1001
MOST_STEPS = 10**7  # of all runs together; beyond, rounding in Fourier transforms reaches delta
MOST_RUNS = 100  # whose steps differ: what the accountants can compose in 20 seconds
MOST_UNITS = 10**12
LARGER = 1.25  # the largest batch is at least so many times the mean one: below, epsilon explodes
TRUNCATED = 0.01  # share of delta that batches cut at the largest size may use up
ROWS_SHARE = 0.3  # of epsilon for the router rows; budgets add about as squares, so it costs 5%
LOWEST = 0.2  # noise multiplier; below, the accountants take minutes and nothing is private
HIGHEST = 1e9  # noise multiplier; above, the accountants' numbers lose their meaning


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
        for name in ("units", "mean_batch", "largest_batch", "steps"):
            found = getattr(self, name)
            if not isinstance(found, int) or isinstance(found, bool):
                raise ValueError(f"{name} must be a whole number, found {found!r}")
        if not 0 < self.units <= MOST_UNITS:
            raise ValueError(f"units must be from 1 to {MOST_UNITS:,}, found {self.units}")
        if not 0 < self.mean_batch <= min(self.units, self.largest_batch):
            raise ValueError(
                f"a mean batch must hold between 1 and all {self.units} units, and no more than "
                f"the largest batch, {self.largest_batch}; found {self.mean_batch}"
            )
        if self.largest_batch > 2 * MOST_UNITS:
            raise ValueError(f"largest_batch is {self.largest_batch}, more than any text has units")
        for name in ("noise_multiplier", "rows_noise_multiplier"):
            found = getattr(self, name)
            if found is None and name == "rows_noise_multiplier":
                continue
            if not isinstance(found, int | float) or isinstance(found, bool):
                raise ValueError(f"{name} must be a number, found {found!r}")
            if not LOWEST <= found <= HIGHEST:
                raise ValueError(f"{name} must be at least {LOWEST}, found {found}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, found {self.steps}")
        if self.steps > MOST_STEPS:
            raise ValueError(
                f"steps must be at most {MOST_STEPS:,}, which is what can be accounted for; found "
                f"{self.steps}"
            )

    @property
    def sampling_probability(self) -> float:
        return self.mean_batch / self.units

    @property
    def truncation(self) -> float:
        """At most the probability that any batch of the run is cut at the largest size."""
        tail = stats.binom.sf(self.largest_batch, self.units, self.sampling_probability)
        return min(1.0, self.steps * float(tail))


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Of all of the mechanisms together: the smaller of two upper bounds.

    Both accountants prove what they say, so that a run is as private as the smaller of their two
    figures, which is nearly always the one of privacy loss distributions.

    Raises:
      ValueError: there are more runs or steps than can be accounted for.
    """
    renyi = renyi_epsilon(mechanisms, delta)
    return min(renyi, pld_epsilon(mechanisms, delta, renyi))


def pld_epsilon(mechanisms: Sequence[Mechanism], delta: float, guess: float | None = None) -> float:
    """An upper bound from privacy loss distributions, on a grid that suits steps and epsilon.

    Args:
      mechanisms, delta: as in `epsilon`.
      guess: about what is to be expected; None asks the Renyi accountant.

    Returns:
      epsilon; infinity if no epsilon belongs to this delta.

    Raises:
      ValueError: there are more runs or steps than can be accounted for.
    """
    counted = _counted(mechanisms)
    guess = renyi_epsilon(mechanisms, delta) if guess is None else guess
    interval = _interval(counted, guess)
    while True:  # a guess that is far too high asks for a grid that is too coarse
        found = _epsilon_on_grid(counted, delta, interval)
        finer = _interval(counted, found)
        if finer > 0.7 * interval:
            return found
        interval = finer


def _counted(mechanisms: Sequence[Mechanism]) -> dict[Mechanism, int]:
    """All steps and releases of some runs: mechanisms, and how often each is used.

    Runs whose steps are alike, as those that were interrupted or tried with another learning rate,
    count as one longer run: composition knows no order. Releases for router rows stand apart.

    Raises:
      ValueError: that is too much.
    """
    steps: collections.Counter[Mechanism] = collections.Counter()
    releases: collections.Counter[Mechanism] = collections.Counter()
    for one, times in collections.Counter(mechanisms).items():
        steps[dataclasses.replace(one, steps=0, rows_noise_multiplier=None)] += one.steps * times
        if one.rows_noise_multiplier is not None:
            releases[dataclasses.replace(one, steps=0)] += times
    different = max(len(steps), len(releases))
    if different > MOST_RUNS or steps.total() > MOST_STEPS:
        raise ValueError(
            f"expected at most {MOST_RUNS} runs whose noise or batches differ, and {MOST_STEPS:,} "
            f"steps in all, which is what can be accounted for; found {different} and "
            f"{steps.total():,}"
        )
    longer = {dataclasses.replace(one, steps=count): 1 for one, count in steps.items()}
    return longer | dict(releases)


def _interval(counted: dict[Mechanism, int], guess: float) -> float:
    """Of a grid for runs that cost about `guess` together."""
    releases = sum(
        (one.steps + (one.rows_noise_multiplier is not None)) * times
        for one, times in counted.items()
    )
    wanted = FINENESS * guess / math.sqrt(max(1, releases))
    losses = [_largest_loss(one) for one in counted if one.steps]
    widest = sum(losses) or max(map(_largest_loss, counted))  # where no step was taken yet
    return max(min(COARSEST, wanted), widest / POINTS)


def _largest_loss(mechanism: Mechanism) -> float:
    """Of one step: what a grid must reach to, but for a probability of exp(-50)."""
    noise, probability = mechanism.noise_multiplier, mechanism.sampling_probability
    loss = 10.1 / noise + 0.5 / noise**2  # of a unit that is in the batch
    if loss < 1e-2:
        return math.log1p(probability * math.expm1(loss))
    absent = math.log1p(-probability) if probability < 1 else -math.inf
    return float(np.logaddexp(absent, math.log(probability) + loss))


def _epsilon_on_grid(counted: dict[Mechanism, int], delta: float, interval: float) -> float:
    """Of batches that are never cut, plus what cutting them can change (see `renyi_epsilon`).

    Where that is more than a small share of delta, dp-accounting's own, slower account of cut
    batches is used instead.
    """
    with np.errstate(over="ignore"):  # in SciPy's logarithms of sums, of bounds that are not used
        losses = _losses(counted, interval)
    cut = sum(one.truncation * times for one, times in counted.items())

    def delta_of(epsilon: float) -> float:
        return losses.get_delta_for_epsilon(epsilon) + cut * (1 + math.exp(min(epsilon, 700)))

    found = _solved(delta_of, delta)
    if cut and cut * (1 + math.exp(min(found, 700))) > TRUNCATED * delta:
        widest = sum(20.2 / one.noise_multiplier + 2 / one.noise_multiplier**2 for one in counted)
        accountant = pld.PLDAccountant(ZERO_OUT, max(interval, widest / POINTS))
        for one, times in counted.items():
            accountant.compose(_event(one, truncated=True), times)
        return _solved(accountant.get_delta, delta)
    return found


def _losses(
    counted: dict[Mechanism, int], interval: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    """The distribution of all privacy losses together, with batches that are never cut."""
    made = functools.partial(
        privacy_loss_distribution.from_gaussian_mechanism,
        value_discretization_interval=interval, neighboring_relation=ZERO_OUT,
    )  # fmt: skip
    total = privacy_loss_distribution.identity(value_discretization_interval=interval)
    for one, times in counted.items():
        if one.steps:
            if one.steps * times > LONG and 3 * _largest_loss(one) < LEAST_POINTS * interval:
                step = _padded(one, interval)
            else:
                step = made(one.noise_multiplier, sampling_prob=one.sampling_probability)
            total = total.compose(step.self_compose(one.steps * times))
        if one.rows_noise_multiplier is not None:
            total = total.compose(made(one.rows_noise_multiplier / math.sqrt(times)))
    return total


def _padded(one: Mechanism, interval: float) -> privacy_loss_distribution.PrivacyLossDistribution:
    """A step's losses as dp-accounting has them, on LEAST_POINTS: the added ones are empty."""

    def losses(adjacency: privacy_loss_mechanism.AdjacencyType) -> pld_pmf.PLDPmf:
        gaussian = privacy_loss_mechanism.GaussianPrivacyLoss(
            one.noise_multiplier, sampling_prob=one.sampling_probability, adjacency_type=adjacency
        )
        bounds = gaussian.connect_dots_bounds()
        first = math.floor(bounds.epsilon_lower / interval)
        last = max(math.ceil(bounds.epsilon_upper / interval), first + LEAST_POINTS)
        deltas = gaussian.get_delta_for_epsilon(np.arange(first, last + 1) * interval)
        return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas)

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
    """The same from Renyi divergences: another upper bound, and a looser one.

    This accountant knows Poisson batches, but not truncated ones. A run with truncated batches
    differs from one without with probability t (`Mechanism.truncation`), so that (e, d) of the
    latter is (e, d + t * (1 + exp(e))) of the former.

    Returns:
      epsilon; infinity if so little of delta would not be enough for t.

    Raises:
      ValueError: there are more runs or steps than can be accounted for.
    """
    counted = _counted(mechanisms)
    accountant = rdp.RdpAccountant(neighboring_relation=ZERO_OUT)
    for one, times in counted.items():
        accountant.compose(_event(one, truncated=False), times)
    found = accountant.get_epsilon(delta * (1 - TRUNCATED))
    truncation = sum(one.truncation * times for one, times in counted.items())
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
      ValueError: a mean batch would be larger than the data; no noise reaches the target, or only
        so much that nothing could be learned.
    """
    if mean_batch > units:
        raise ValueError(
            f"data.batch_size={mean_batch} is the mean number of units in a batch, and there are "
            f"only {units} units to train on; make it smaller"
        )
    if not 0 < target < math.inf or not 0 < delta < 1:
        raise ValueError(
            f"expected a positive epsilon and a delta in (0, 1), found {target} and {delta}"
        )
    if steps < 1:
        raise ValueError(f"a private run takes at least 1 step, found {steps}")
    rows_noise = None
    if rows:
        rows_noise = _up(dp_accounting.get_sigma_gaussian(ROWS_SHARE * target, delta))
        rows_noise = min(max(LOWEST, rows_noise), HIGHEST)
    largest = largest_batch(target, delta, units, mean_batch, steps, multiple)

    def make(noise: float) -> Mechanism:
        return Mechanism(units, mean_batch, largest, steps, noise, rows_noise)

    if renyi_epsilon([make(LOWEST)], delta) <= target:
        return make(LOWEST)
    most = 10 * mean_batch * math.sqrt(steps)  # ten times what all batches together can add up to
    gaussian = mean_batch / units * math.sqrt(2 * steps * math.log(1 / delta)) / target
    rough = _least_noise(lambda noise: renyi_epsilon([make(noise)], delta), target, gaussian)

    def fine(noise: float) -> float:
        counted = {make(noise): 1}
        return _epsilon_on_grid(counted, delta, _interval(counted, target))

    noise = _least_noise(fine, target, 0.95 * (rough or gaussian))
    if noise is None or noise > most:
        raise ValueError(
            f"epsilon {target:g} (at delta {delta:.2g}) cannot be met for this text and these "
            f"steps: with {units:,} units, batches of {mean_batch:,} and {steps:,} steps it "
            + ("is reached by no noise" if noise is None else f"takes {noise:,.0f} times a unit's "
               "part as noise, in which all of the text is lost")
            + "; ask for more with --dp-epsilon, or train on more units"
        )  # fmt: skip
    made = make(_up(noise))
    while epsilon([made], delta) > target:
        made = make(_up(made.noise_multiplier * 1.001))
    return made


def _least_noise(epsilon_of: Callable[[float], float], target: float, guess: float) -> float | None:
    """About the smallest noise multiplier that meets a target; None if none does."""
    tried: dict[float, float] = {}

    def excess(log_noise: float) -> float:
        if log_noise not in tried:
            found = epsilon_of(math.exp(log_noise))
            tried[log_noise] = math.log(min(max(found, 1e-12), 1e12) / target)
        return tried[log_noise]

    first, last = math.log(LOWEST), math.log(HIGHEST)
    lower = upper = min(max(first, math.log(guess)), last)
    step = 0.1
    while excess(upper) > 0:
        if upper == last:
            return None
        lower, upper = upper, min(last, upper + step)
        step *= 2
    while excess(lower) <= 0:
        if lower == first:
            return LOWEST
        lower, upper = max(first, lower - step), lower
        step *= 2
    optimize.brentq(excess, lower, upper, xtol=1e-3, rtol=1e-9)
    return math.exp(min(noise for noise, value in tried.items() if value <= 0))


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
