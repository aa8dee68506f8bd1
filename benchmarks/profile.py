"""Where the time of our side goes, part by part: the profile beside the table.

    python -m benchmarks.profile              # writes docs/profile.md; ten minutes

Each case runs under JAX's profiler. XLA's operations are told apart by the scope they were traced
in (their `op_name`), which is read from the compiled programs.
"""

import argparse
import collections
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flexolmo_jax.runtime.startup import keep_freed_memory, leave_libtpu_alone, with_large_pages

CASES = (  # name, case and option of `ours.build`, the program
    ("expert_step", "expert_step", "", "train_step"),
    ("anchor_step", "anchor_step", "", "train_step"),
    ("merged_forward, grouped", "merged_forward", "grouped", "logits"),
    ("decode_1, float32", "decode_1", "float32", "_loop"),
    ("decode_1, int8", "decode_1", "int8", "_loop"),
    ("moe_8_4, grouped", "moe_8_4", "grouped", "gradients"),
    ("moe_64_4, grouped", "moe_64_4", "grouped", "gradients"),
)
RUNS = 3
PARTS = (  # the first that fits; what an `op_name` holds, and what it is
    ("experts", r"experts"),
    ("attention", r"attention"),
    ("head and loss", r"bcv|bcd|logits|jvp\(\)\)?/while/body/|/body/dot_general$"),
    ("optimizer", r"^jit\(train_step\)/(?!jvp|transpose)"),
)
CONTAINERS = ("while", "call", "conditional")  # their operations have lines of their own
OPERATION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")


def measure(case: str, option: str, program: str, suite: str, name: str) -> dict:
    """Runs a case in this process.

    Returns:
      {"seconds": of a run under the profiler; "parts": {part: [of products, of all else]}}, in
      seconds of a run. Operations that run at the same time are counted each, so that parts may
      come to more than a run.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_dump_to={folder}/hlo --xla_dump_hlo_as_text"
        dump += f" --xla_dump_hlo_module_re=jit_{program}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"

        leave_libtpu_alone()  # before JAX is imported
        keep_freed_memory()  # as `flexolmo train` does
        from benchmarks.ours import build
        from benchmarks.sizes import SUITES

        run = build(case, SUITES[suite][name], option)
        for _ in range(2):
            run()
        return _traced(run, Path(folder), program)


def _traced(run, folder: Path, program: str) -> dict:
    import jax

    start = time.perf_counter()
    with jax.profiler.trace(folder / "trace"):
        for _ in range(RUNS):
            run()
        seconds = (time.perf_counter() - start) / RUNS
    (file,) = (folder / "trace").rglob("*.xplane.pb")
    known = _operations(folder / "hlo")
    parts: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                said = dict(event.stats)
                if said.get("hlo_module") != f"jit_{program}":
                    continue
                kind, scope = known.get(said["hlo_op"], ("", ""))
                if kind in CONTAINERS:
                    continue
                fused = said["hlo_op"].startswith("ynn_fusion")  # XLA's library of products
                is_product = fused or scope.endswith("dot_general")
                parts[_part(scope)][not is_product] += event.duration_ns / 1e9 / RUNS
    return {"seconds": seconds, "parts": dict(parts)}


def _operations(folder: Path) -> dict[str, tuple[str, str]]:
    """Of each operation of the compiled programs: its opcode, and the scope it was traced in."""
    found = {}
    for file in folder.glob("*after_optimizations.txt"):
        for line in file.open():
            matched, scope = OPERATION.match(line), re.search(r'op_name="([^"]*)"', line)
            if matched:
                found[matched[1]] = (matched[2], scope[1] if scope else "")
    return found


def _part(scope: str) -> str:
    return next((part for part, held in PARTS if re.search(held, scope)), "norms, sums, embedding")


def page(results: dict[str, dict[str, dict]], about: str) -> str:
    """Markdown."""
    lines = [
        "# Where the time goes",
        "",
        f"`python -m benchmarks.profile`, {about}. Milliseconds of XLA's operations in one run, by "
        "the part of the code they come from; *products* are matrix products, with what XLA fuses "
        "into them. Operations that run at the same time count each.",
    ]
    for name, cases in results.items():
        lines += ["", f"## {name}", "", "| case | part | products | all else | share |"]
        lines += ["| --- | --- | ---: | ---: | ---: |"]
        for case, found in cases.items():
            total = sum(map(sum, found["parts"].values()))
            parts = sorted(found["parts"].items(), key=lambda one: -sum(one[1]))
            for part, (products, rest) in parts:
                cells = (
                    f"{1e3 * products:,.0f} | {1e3 * rest:,.0f} | {(products + rest) / total:.0%}"
                )
                lines.append(f"| {case} | {part} | {cells} |")
            products, rest = (sum(one[i] for one in found["parts"].values()) for i in (0, 1))
            lines.append(
                f"| {case} | all, {1e3 * found['seconds']:,.0f} ms a run | {1e3 * products:,.0f} | "
                f"{1e3 * rest:,.0f} | {products / total:.0%} products |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--suite", choices=("cpu", "smoke"), default="cpu")
    parser.add_argument("--sizes", nargs="+", help="of the suite; default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/profile.md"))
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    from benchmarks.sizes import SUITES

    about = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, "
    about += str(datetime.date.today())
    results: dict[str, dict[str, dict]] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.sizes or SUITES[args.suite]:
        for title, *case in CASES:
            words = [sys.executable, "-m", "benchmarks.profile", "--one", *case, args.suite, name]
            done = subprocess.run(
                words, env=with_large_pages(), stdout=subprocess.PIPE, text=True, check=True
            )
            results.setdefault(name, {})[title] = json.loads(done.stdout.splitlines()[-1])
            args.out.write_text(page(results, about))  # an interruption loses one case
    print(args.out.read_text())


if __name__ == "__main__":
    main()
