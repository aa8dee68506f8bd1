"""Calibration: the least noise, and the smallest safe batch, for a privacy budget."""

import math
from collections.abc import Callable

import dp_accounting
import numpy as np
from scipy import optimize, stats

from flexolmo_jax.privacy.accounting import (
    MAX_NOISE,
    MIN_NOISE,
    TRUNCATION_SHARE_OF_DELTA,
    Mechanism,
    choose_grid,
    epsilon,
    epsilon_on_grid,
    renyi_epsilon,
)

# Share of epsilon for the router rows. Epsilons add up about as squares, so it costs training 5%.
ROWS_SHARE = 0.3
# The largest batch is at least this multiple of the mean batch: below it, epsilon explodes.
MIN_LARGEST_BATCH_RATIO = 1.25
# Noise above this multiple of what all batches together can add up to leaves nothing to learn.
MAX_NOISE_TO_SIGNAL = 10


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
    """The run with the least noise whose `epsilon` is at most a target.

    Args:
      target, delta: the budget of the whole run.
      units, mean_batch, steps: as in `Mechanism`.
      rows: whether router rows are fitted to a release of their own.
      multiple: the largest batch is a multiple of it.

    Raises:
      ValueError: a mean batch would be larger than the data; no noise reaches the target, or it
        takes so much noise that nothing could be learned.
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
        rows_noise = min(max(MIN_NOISE, rows_noise), MAX_NOISE)
    largest = largest_batch(target, delta, units, mean_batch, steps, multiple)

    def run(noise: float) -> Mechanism:
        return Mechanism(units, mean_batch, largest, steps, noise, rows_noise)

    if renyi_epsilon([run(MIN_NOISE)], delta) <= target:
        return run(MIN_NOISE)
    noise = _calibrated_noise(run, target, delta)
    too_much = MAX_NOISE_TO_SIGNAL * mean_batch * math.sqrt(steps)
    if noise is None or noise > too_much:
        raise ValueError(
            f"epsilon {target:g} (at delta {delta:.2g}) cannot be met for this text and these "
            f"steps: with {units:,} units, batches of {mean_batch:,} and {steps:,} steps it "
            + ("is reached by no noise" if noise is None else f"takes {noise:,.0f} times a unit's "
               "contribution as noise, which hides all of the text")
            + "; ask for more with --dp-epsilon, or train on more units"
        )  # fmt: skip
    calibrated = run(_up(noise))
    while epsilon([calibrated], delta) > target:
        calibrated = run(_up(calibrated.noise_multiplier * 1.001))
    return calibrated


def _calibrated_noise(
    run: Callable[[float], Mechanism], target: float, delta: float
) -> float | None:
    """The noise by privacy loss distributions; Renyi's, which takes no time, is the first guess."""
    guess = run(MIN_NOISE)
    gaussian = guess.sampling_probability * math.sqrt(2 * guess.steps * math.log(1 / delta))
    gaussian /= target
    rough = _least_noise(lambda noise: renyi_epsilon([run(noise)], delta), target, gaussian)

    def fine(noise: float) -> float:
        counted = {run(noise): 1}
        return epsilon_on_grid(counted, delta, choose_grid(counted, delta, target))

    return _least_noise(fine, target, 0.95 * (rough or gaussian))


def _least_noise(epsilon_of: Callable[[float], float], target: float, guess: float) -> float | None:
    """About the smallest noise multiplier that meets a target; None if none does."""
    tried: dict[float, float] = {}

    def excess(log_noise: float) -> float:
        if log_noise not in tried:
            found = epsilon_of(math.exp(log_noise))
            tried[log_noise] = math.log(min(max(found, 1e-12), 1e12) / target)
        return tried[log_noise]

    first, last = math.log(MIN_NOISE), math.log(MAX_NOISE)
    lower = upper = min(max(first, math.log(guess)), last)
    step = 0.1
    while excess(upper) > 0:
        if upper == last:
            return None
        lower, upper = upper, min(last, upper + step)
        step *= 2
    while excess(lower) <= 0:
        if lower == first:
            return MIN_NOISE
        lower, upper = max(first, lower - step), lower
        step *= 2
    optimize.brentq(excess, lower, upper, xtol=1e-3, rtol=1e-9)
    return math.exp(min(noise for noise, value in tried.items() if value <= 0))


def largest_batch(
    epsilon: float, delta: float, units: int, mean_batch: int, steps: int, multiple: int
) -> int:
    """The smallest safe largest batch: truncating batches at it costs next to nothing.

    It is a multiple of `multiple`, and at least MIN_LARGEST_BATCH_RATIO times the mean batch.
    """
    size = math.ceil(MIN_LARGEST_BATCH_RATIO * mean_batch)
    # It must be safe for Renyi's epsilon too, which is larger; 2 * epsilon + 1 leaves room for it.
    allowed = math.log(TRUNCATION_SHARE_OF_DELTA * delta / steps)
    allowed -= np.logaddexp(0, 2 * epsilon + 1)
    while size < units and stats.binom.logsf(size, units, mean_batch / units) > allowed:
        size += 1
    return -(-size // multiple) * multiple


def default_delta(units: int) -> float:
    """A tenth of one unit's share, and at most 1e-5."""
    return min(1e-5, 0.1 / units)


def _up(value: float) -> float:
    """Rounded to four decimals: more noise, not less."""
    return math.ceil(value * 1e4) / 1e4
