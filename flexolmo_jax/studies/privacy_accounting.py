"""Tries the accounting on many settings: is the noise least, and does verify agree with it?

    python flexolmo_jax/studies/privacy_accounting.py OUT [--settings 300] [--seed 0]

Writes one line of JSON for each setting to OUT, and goes on where it stopped. Settings are drawn
log-uniformly: 1e3 to 1e8 units, sampling 1e-6 to 0.5 (at least one unit in the mean batch), 1 to
1e6 steps, epsilon 0.02 to 20, half of them with a release for router rows. For each, a run is
calibrated, its certificate verified, and 2% less noise accounted for on a grid four times as fine:
that must cost more than epsilon, or the noise was not within 2% of the least. Seconds are of one
CPU core (OMP_NUM_THREADS=1), as other work may share the machine.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

from flexolmo_jax.config import PrivacyConfig
from flexolmo_jax.privacy import accounting, calibration
from flexolmo_jax.privacy.certificate import make_certificate, verify_certificate


def setting(number: int, seed: int) -> dict:
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


def tried(values: dict) -> dict:
    """What came of a setting: noise, seconds, and what is wrong, if anything."""
    values = dict(values)
    target = values.pop("epsilon")
    delta = calibration.default_delta(values["units"])
    start = time.process_time()
    try:
        made = calibration.calibrate(target, delta, multiple=8, **values)
    except ValueError as error:
        return {"refused": str(error), "seconds": round(time.process_time() - start, 1)}
    between = time.process_time()
    stated = make_certificate(
        PrivacyConfig(target), made, delta, window_tokens=1024,
        rows_clip=1.0 if values["rows"] else None, other_runs=[], library="none",
    )  # fmt: skip
    start_verify, faults = time.process_time(), []
    try:
        verify_certificate(json.loads(json.dumps(stated)), "here")
    except ValueError as error:
        faults.append(str(error))
    end = time.process_time()
    if made.noise_multiplier > accounting.MIN_NOISE * 1.02:
        less = accounting.Mechanism(
            **{**vars(made), "noise_multiplier": made.noise_multiplier / 1.02}
        )
        grid = accounting.choose_grid({less: 1}, delta, target)
        finer = grid._replace(interval=grid.interval / 4)
        if accounting.epsilon_on_grid({less: 1}, delta, finer) <= target:
            faults.append("2% less noise is enough")
    return {
        "noise": made.noise_multiplier, "stated": stated["epsilon"],
        "seconds": round(between - start, 1), "verify_seconds": round(end - start_verify, 1),
        "faults": faults,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--settings", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    done = len(args.out.read_text().splitlines()) if args.out.exists() else 0
    for number in range(done, args.settings):
        values = setting(number, args.seed)
        row = json.dumps({"number": number, **values, **tried(values)})
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(row + "\n")
    rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    wrong = [row for row in rows if row.get("faults")]
    refused = [row for row in rows if "refused" in row]
    slowest = max(max(row["seconds"], row.get("verify_seconds", 0)) for row in rows)
    print(
        f"{len(rows)} settings: {len(wrong)} wrong, {len(refused)} refused in words, the slowest "
        f"answer took {slowest} s of one core"
    )
    for row in wrong:
        print(json.dumps(row))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
