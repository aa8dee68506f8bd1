"""Tests the accounting on random settings: is the noise minimal, and does verification agree?

    OMP_NUM_THREADS=1 flexolmo study privacy-accounting OUT [--settings 300] [--seed 0]

Writes one line of JSON for each setting to OUT, and resumes where it stopped. Settings are drawn
log-uniformly: 1e3 to 1e8 units, sampling 1e-6 to 0.5 (at least one unit in the mean batch), 1 to
1e6 steps, epsilon 0.02 to 20, half of them with a release for router rows. For each, a run is
calibrated, its certificate is verified, and 2% less noise is accounted for on a grid four times as
fine: that must cost more than epsilon, or the noise was not within 2% of the minimum. Seconds are
of one CPU core (OMP_NUM_THREADS=1), as other work may share the machine.
"""

import argparse
import dataclasses
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.config import PrivacyConfig
from flexolmo_jax.privacy import accounting, calibration
from flexolmo_jax.privacy.certificate import make_certificate, verify_certificate

LESS = 1.02  # the factor of noise that must make a difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study privacy-accounting`."""
    parser.add_argument("out", type=Path, help="file of JSON lines")
    parser.add_argument("--settings", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Tries the settings that OUT lacks, and prints what failed.

    Raises:
      ValueError: a setting failed.
    """
    done = len(args.out.read_text().splitlines()) if args.out.exists() else 0
    for number in range(done, args.settings):
        setting = draw_setting(number, args.seed)
        row = json.dumps({"number": number, **setting, **try_setting(setting)})
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(row + "\n")
    rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    print(summary(rows))
    failed = [row for row in rows if row.get("faults")]
    for row in failed:
        print(json.dumps(row))
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} settings failed; see above")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """All settings in one sentence."""
    failed = sum(bool(row.get("faults")) for row in rows)
    refused = sum("refused" in row for row in rows)
    slowest = max(max(row["seconds"], row.get("verify_seconds", 0)) for row in rows)
    return (
        f"{len(rows)} settings: {failed} failed, {refused} were refused with a reason, the slowest "
        f"answer took {slowest} s of one core"
    )


def draw_setting(number: int, seed: int) -> dict[str, Any]:
    """The numbered setting; the same on every machine."""
    draw = random.Random(f"{seed}-{number}")

    def between(low: float, high: float) -> float:
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    units = round(between(1e3, 1e8))
    sampling = between(max(1e-6, 1 / units), 0.5)
    return {
        "units": units, "mean_batch": max(1, round(sampling * units)),
        "steps": round(between(1, 1e6)), "epsilon": round(between(0.02, 20), 4),
        "rows": draw.random() < 0.5,
    }  # fmt: skip


def try_setting(setting: dict[str, Any]) -> dict[str, Any]:
    """Calibrates and verifies one run.

    Args:
      setting: as `draw_setting` returns it.

    Returns:
      noise, stated epsilon, seconds, and `faults`: what is wrong; or why the run is `refused`.
    """
    run_values = dict(setting)
    target = run_values.pop("epsilon")
    delta = calibration.default_delta(run_values["units"])
    started = time.process_time()
    try:
        mechanism = calibration.calibrate(target, delta, multiple=8, **run_values)
    except ValueError as error:
        return {"refused": str(error), "seconds": round(time.process_time() - started, 1)}
    calibrated = time.process_time()
    certificate = make_certificate(
        PrivacyConfig(target), mechanism, delta, window_tokens=1024,
        rows_clip=1.0 if run_values["rows"] else None, other_runs=[], library="none",
    )  # fmt: skip
    verify_started, faults = time.process_time(), []
    try:
        verify_certificate(json.loads(json.dumps(certificate)), "here")
    except ValueError as error:
        faults.append(str(error))
    verified = time.process_time()
    if mechanism.noise_multiplier > accounting.MIN_NOISE * LESS:
        if epsilon_with_less_noise(mechanism, delta, target) <= target:
            faults.append("2% less noise is enough")
    return {
        "noise": mechanism.noise_multiplier, "stated": certificate["epsilon"],
        "seconds": round(calibrated - started, 1),
        "verify_seconds": round(verified - verify_started, 1), "faults": faults,
    }  # fmt: skip


def epsilon_with_less_noise(mechanism: accounting.Mechanism, delta: float, target: float) -> float:
    """Epsilon with 2% less noise, on a grid four times as fine as that of the calibration."""
    noise = mechanism.noise_multiplier / LESS
    less = dataclasses.replace(mechanism, noise_multiplier=noise)
    grid = accounting.choose_grid({less: 1}, delta, target)
    finer = grid._replace(interval=grid.interval / 4)
    return accounting.epsilon_on_grid({less: 1}, delta, finer)
