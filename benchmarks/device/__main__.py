"""Runs every part in a process of its own, within a limit of time, and writes a table and JSON.

    benchmarks/device.sh OUT            # a machine with a CUDA GPU: at most 8 minutes
    benchmarks/device.sh OUT --toy      # any machine, at toy size: about a minute

It writes OUT/device.json and OUT/device.txt after every part, and OUT/device.log has what the parts
print. With a device.json of the same machine, code and size in OUT, only what is missing in it, or
failed, is run. The parts come in order of importance: if time ends, the table says what is missing.
"""

import argparse
import datetime
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.device.page import page
from benchmarks.device.process import run
from benchmarks.device.sections import Part, number_of, parts_of
from benchmarks.machine import commit, gpu, machine, versions

SECONDS = 470  # of a whole run; the rest of 8 minutes is for starting and ending
LEAST = 10  # seconds that a part needs at least
ROOT = Path(__file__).parents[2]
Results = dict[str, dict[str, dict[str, Any]]]  # case -> label -> what was measured, or why not
Measure = Callable[[Part, list[str], float], tuple[dict[str, dict[str, Any]], str]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/device.sh", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, nargs="?", default=os.environ.get("OUT", "build/device"))
    parser.add_argument("--toy", action="store_true", help="at toy size, on any machine")
    args = parser.parse_args()
    size = "toy" if args.toy else "1B"
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "size": size, "machine": machine(), "gpu": gpu(), "commit": commit(),
        "versions": versions("jax", "jaxlib", "flax", "torch", "transformers"),
    }  # fmt: skip
    results = earlier(out / "device.json", about)
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), out.absolute() / "device.log"
        measure = functools.partial(_measure, size=size, folder=folder, log=log)
        run_parts(parts_of(size), results, out, about, folder, SECONDS, measure)
    print((out / "device.txt").read_text())
    if bad := failures(results):
        sys.exit("not measured, or beyond its bound: " + "; ".join(bad))


def earlier(record: Path, about: dict[str, str]) -> Results:
    """The results of an interrupted run, if machine, code and size are the same."""
    if not record.exists():
        return {}
    found = json.loads(record.read_text())
    return found["results"] if all(found.get(key) == about[key] for key in about) else {}


def failures(results: Results) -> list[str]:
    """What was not measured, and which checks of parity are beyond their bounds."""
    found = []
    for case, sides in results.items():
        for label, measured in sides.items():
            if "failed" in measured:
                found.append(f"{case}, {label}: {measured['failed']}")
            checks = measured.get("checks", [])
            found += [f"{label}: {what}: {value}" for what, value, is_good in checks if not is_good]
    return found


def run_parts(
    parts: list[Part],
    results: Results,
    out: Path,
    about: dict[str, str],
    folder: Path,
    seconds: float,
    measure: Measure,
) -> None:
    """Runs what `results` lacks, part after part, until the time ends; results are added to it.

    Args:
      parts: in order of importance.
      results: of an earlier run, or empty.
      out: where the record and the table go, after every part.
      about: the machine, the code and the size.
      folder: where parts leave files for each other.
      seconds: for all of them together.
      measure: runs the cases of a part within a limit in seconds.
    """
    begun = time.monotonic()
    for part in parts:
        wanted = [case for case in part.cases if not _is_known(results, case, part, folder)]
        left = seconds - (time.monotonic() - begun)
        if wanted and left >= LEAST:
            found, why = measure(part, wanted, min(part.limit, left))
        else:
            found, why = {}, "no time was left"
        for case in wanted:
            results.setdefault(case, {})[part.label] = found.get(case, {"failed": why})
        record = {
            **about, "date": str(datetime.date.today()),
            "wall_seconds": round(time.monotonic() - begun), "results": results,
        }  # fmt: skip
        (out / "device.json").write_text(json.dumps(record, indent=1))
        (out / "device.txt").write_text(page(record))


def _is_known(results: Results, case: str, part: Part, folder: Path) -> bool:
    """Whether a case was measured, and what it makes for other parts is still there."""
    found = results.get(case, {}).get(part.label, {"failed": ""})
    return "failed" not in found and (not part.makes or (folder / part.makes).exists())


def _measure(
    part: Part, cases: list[str], limit: float, *, size: str, folder: Path, log: Path
) -> tuple[dict[str, dict[str, Any]], str]:
    words = [sys.executable, "-m", "benchmarks.device.one_part", str(number_of(part)), size]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict(part.environment)}
    with log.open("a") as opened:
        opened.write(f"== {part.label}: {', '.join(cases)}\n")
    return run([*words, str(time.time()), *cases], folder, environment, log, limit)


if __name__ == "__main__":
    main()
