"""Where the time of our side goes, by part of the model.

    python -m benchmarks.profile              # writes docs/profile.md; ten minutes

Each case runs under JAX's profiler. The scope in which an XLA operation was traced (its `op_name`,
read from the compiled program) says to which part it belongs.
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

from flexolmo_jax.runtime.startup import leave_libtpu_alone, with_large_pages

LAYERWISE = "embed|attend|add|layer|logits"  # of inference/layerwise.py
PROFILED = (  # name, case and its option, the programs (a regular expression)
    ("expert_step", "expert_step", "", "train_step"),
    ("anchor_step", "anchor_step", "", "train_step"),
    ("merged_forward, grouped", "merged_forward", "grouped", "whole_forward"),
    ("decode_1, float32", "decode_1", "float32", LAYERWISE),
    ("decode_1, bfloat16", "decode_1", "bfloat16", LAYERWISE),
    ("decode_1, int8", "decode_1", "int8", LAYERWISE),
    ("moe_8_4, grouped", "moe_8_4", "grouped", "gradients"),
    ("moe_64_4, grouped", "moe_64_4", "grouped", "gradients"),
)
RUNS = 3
PARTS = (  # name and a pattern of `op_name`; the first match counts
    ("experts", r"experts|^jit\(add\)"),
    ("attention", r"attention|^jit\((attend|layer)\)"),  # in decoding, with norms and the router
    ("head and loss", r"bcv|bcd|logits|jvp\(\)\)?/while/body/|/body/dot_general$"),
    ("optimizer", r"^jit\(train_step\)/(?!jvp|transpose)"),
)
CONTAINERS = ("while", "call", "conditional")  # their operations are counted, not they themselves
OPERATION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")


def measure(case: str, option: str, program: str, suite: str, name: str) -> dict:
    """Runs a case in this process.

    Returns:
      {"seconds": of a run under the profiler; "parts": {part: [of matmuls, of the rest]}}, in
      seconds per run. Concurrent operations are all counted, so the parts may add up to more than
      a run.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_dump_to={folder}/hlo --xla_dump_hlo_as_text"
        dump += f" --xla_dump_hlo_module_re=jit_({program})"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"

        leave_libtpu_alone()  # before JAX is imported
        from benchmarks.cases import CASES
        from benchmarks.sizes import SUITES

        run = CASES[case].jax(SUITES[suite][name], option)
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
    known = operations(folder / "hlo")
    parts: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                module = str(stats.get("hlo_module"))
                if not re.fullmatch(f"jit_({program})", module):
                    continue
                opcode, scope = known.get((module, stats["hlo_op"]), ("", ""))
                if opcode in CONTAINERS:
                    continue
                fused = stats["hlo_op"].startswith("ynn_fusion")  # XLA's library of matmuls
                is_matmul = fused or opcode == "dot" or scope.endswith("dot_general")
                scope = scope or f"jit({module.removeprefix('jit_')})"
                parts[_part(scope)][not is_matmul] += event.duration_ns / 1e9 / RUNS
    if not parts:
        raise RuntimeError(f"the trace holds no operation of jit_{program}: has it another name?")
    return {"seconds": seconds, "parts": dict(parts)}


def operations(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """The opcode and the traced scope of each operation of the compiled programs.

    A program that was compiled for several shapes counts as the last of them: in decoding, that is
    the one for new tokens, not that of the prompt. XLA drops the scopes of some operations, such as
    matrix-vector products; they get what the scopes of their computation have in common.
    """
    found = {}
    for file in sorted(folder.glob("*after_optimizations.txt")):
        module = file.name.split(".")[1]
        for computation in file.read_text().split("\n}\n"):
            own = {}
            for line in computation.splitlines():
                matched, scope = OPERATION.match(line), re.search(r'op_name="([^"]*)"', line)
                if matched:
                    own[matched[1]] = (matched[2], scope[1] if scope else "")
            scopes = [scope for _, scope in own.values() if scope]
            common = os.path.commonprefix(scopes).rpartition("/")[0]
            for name, (opcode, scope) in own.items():
                found[module, name] = (opcode, scope or common)
    return found


def _part(scope: str) -> str:
    return next((part for part, text in PARTS if re.search(text, scope)), "norms, sums, embedding")


def page(results: dict[str, dict[str, dict]], about: str) -> str:
    """Markdown."""
    lines = [
        "# Where the time goes",
        "",
        f"`python -m benchmarks.profile`, {about}. Milliseconds of XLA's operations in one run, by "
        "the part of the code that they come from; *matmuls* include what XLA fuses into them. "
        "Concurrent operations are all counted.",
    ]
    for name, cases in results.items():
        lines += ["", f"## {name}", "", "| case | part | matmuls | the rest | share |"]
        lines += ["| --- | --- | ---: | ---: | ---: |"]
        for case, found in cases.items():
            total = sum(map(sum, found["parts"].values()))
            parts = sorted(found["parts"].items(), key=lambda part: -sum(part[1]))
            for part, (matmuls, rest) in parts:
                cells = f"{1e3 * matmuls:,.0f} | {1e3 * rest:,.0f} | {(matmuls + rest) / total:.0%}"
                lines.append(f"| {case} | {part} | {cells} |")
            matmuls, rest = (sum(part[i] for part in found["parts"].values()) for i in (0, 1))
            lines.append(
                f"| {case} | all, {1e3 * found['seconds']:,.0f} ms a run | {1e3 * matmuls:,.0f} | "
                f"{1e3 * rest:,.0f} | {matmuls / total:.0%} matmuls |"
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
        for title, *case in PROFILED:
            words = [sys.executable, "-m", "benchmarks.profile", "--one", *case, args.suite, name]
            done = subprocess.run(
                words, env=with_large_pages(), stdout=subprocess.PIPE, text=True, check=True
            )
            results.setdefault(name, {})[title] = json.loads(done.stdout.splitlines()[-1])
            args.out.write_text(page(results, about))  # an interruption loses one case
    print(args.out.read_text())


if __name__ == "__main__":
    main()
