"""Runs all sides of every case, interleaved, and writes a table: Markdown and JSON.

    python -m benchmarks                      # 2 CPU cores: an hour and a half
    python -m benchmarks --suite smoke        # does everything still run? a few minutes
    python -m benchmarks --only decode_1      # one case; the rest of the table does not change

Needs the extra `reference` (PyTorch and transformers), for the PyTorch baselines.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
from pathlib import Path

from rich.progress import Progress

from benchmarks.cases import CASES
from benchmarks.machine import commit, machine, versions
from benchmarks.page import page
from benchmarks.sizes import SUITES
from benchmarks.worker import compare
from flexolmo_jax.runtime.startup import leave_libtpu_alone


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument(
        "--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE"
    )
    parser.add_argument("--sizes", nargs="+", help="of the suite; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs a side: %(default)s")
    parser.add_argument(
        "--out", default="docs/benchmarks",
        help="the page OUT.md, and beside it results/OUT.json; default: %(default)s",
    )  # fmt: skip
    args = parser.parse_args()
    suite = SUITES[args.suite]
    unknown = set(args.sizes or ()) - set(suite)
    if unknown:
        parser.error(f"the suite {args.suite} has no size {sorted(unknown)}; it has {list(suite)}")
    leave_libtpu_alone()  # in the processes of all sides
    about = _about(args.suite)
    out = Path(args.out)
    record = out.parent / "results" / f"{out.name}.json"
    results = _earlier(record, about)
    chosen = args.sizes or list(suite)
    failed: list[str] = []
    with Progress() as bar:
        task = bar.add_task("", total=len(chosen) * len(args.only))
        for name in chosen:
            for case in args.only:
                bar.update(task, description=f"{name} {case}")
                cases = results.setdefault(name, {})
                try:
                    measured = compare(CASES[case].sides(), suite[name], args.rounds)
                except RuntimeError as error:  # the other cases still run
                    failed.append(f"{name} {case}: {error}")
                    bar.advance(task)
                    continue
                cases[case] = {
                    "date": str(datetime.date.today()),
                    "commit": commit(),
                    "command": command(sys.argv[1:]),
                    "sides": measured,
                }
                results[name] = {case: cases[case] for case in CASES if case in cases}
                bar.advance(task)
                record.parent.mkdir(parents=True, exist_ok=True)  # an interruption loses one case
                everything = json.dumps({**about, "results": results}, indent=1)
                record.write_text(everything)
                out.with_suffix(".md").write_text(page(about, results, suite))
    if out.with_suffix(".md").exists():
        print(out.with_suffix(".md").read_text())
    if failed:
        sys.exit("not measured: " + "; ".join(failed))


def command(words: list[str]) -> str:
    """The command of these arguments, but for where its results were written."""
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out")
    _, others = out.parse_known_args(words)
    return shlex.join(["python", "-m", "benchmarks", *others])


def _earlier(file: Path, about: dict[str, str]) -> dict:
    """The results in the table, if they were measured under the same circumstances."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    return found["results"] if all(found.get(key) == about[key] for key in about) else {}


def _about(suite: str) -> dict[str, str]:
    import torch  # not above: each process of ours would import it too

    return {
        "command": f"python -m benchmarks --suite {suite}",
        "machine": machine(),
        "threads": f"{torch.get_num_threads()} in PyTorch, {os.cpu_count()} in JAX: their defaults",
        "versions": versions("jax", "jaxlib", "torch", "transformers"),
    }


if __name__ == "__main__":
    main()
