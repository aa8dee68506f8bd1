"""Runs both sides of every case in turn and writes a table: Markdown and JSON.

    python -m benchmarks                      # 2 CPU cores: half an hour
    python -m benchmarks --suite smoke        # does everything still run? a few minutes
    python -m benchmarks --only decode_1      # one case

Needs the extra `reference` (PyTorch and transformers), for the peer's side.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from rich.progress import Progress

from benchmarks.sizes import LAYERS, SUITES, Size
from benchmarks.worker import Measured, compare
from flexolmo_jax.flops import anchor_step_flops, expert_step_flops, forward_flops

OURS, PEER = "benchmarks.ours", "benchmarks.peer"
CASES = ("gemm", "expert_step", "expert_alone_step", "anchor_step", "merged_forward")
CASES += ("decode_1", "decode_8", *(f"moe_{e}_{a}" for e, a in LAYERS))


def sides(case: str) -> list[tuple[str, str, str]]:
    """(label, module, option) of every contestant of a case; the last ones are the peer's."""
    peers = [("transformers, eager", PEER, "eager")]
    if case not in ("gemm", "anchor_step"):  # one expert, or none: nothing to choose
        peers.append(("transformers, grouped_mm", PEER, "grouped_mm"))
    if case == "gemm":
        return [("jax", OURS, ""), ("torch", PEER, "eager")]
    if case == "expert_alone_step":
        return [("ours, gate fixed to 1", OURS, "")]
    if case.startswith("moe_") or case == "merged_forward":
        return [("ours, dense", OURS, "dense"), ("ours, grouped", OURS, "grouped"), *peers]
    if case.startswith("decode_"):
        forms = [("ours, float32", OURS, "float32"), ("ours, bfloat16", OURS, "bfloat16")]
        return [*forms, *peers]
    return [("ours", OURS, ""), *peers]


def tokens(case: str, size: Size) -> int:
    """Tokens that one run of a case makes or reads."""
    if case.startswith("decode_"):
        return int(case.split("_")[1]) * size.new_tokens
    return size.tokens if case.startswith("moe_") else size.batch * size.length


def flops(case: str, size: Size) -> float:
    """FLOPs that one run needs; 0 where bytes are the limit."""
    config = size.config
    if case == "gemm":
        return 2.0 * size.gemm**3
    if case == "expert_step":
        each = expert_step_flops(config, size.length)
    elif case == "anchor_step":
        each = anchor_step_flops(config, size.length)
    elif case == "merged_forward":
        each = forward_flops(config, size.length, size.active)
    elif case.startswith("moe_"):  # forward, and back to inputs and weights
        each = 3 * 6.0 * config.width * config.ffn_width * int(case.split("_")[2])
    else:
        return 0.0
    return each * tokens(case, size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--sizes", nargs="+", help="of the suite; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs a side: %(default)s")
    parser.add_argument("--out", default="docs/benchmarks", help="default: %(default)s(.md, .json)")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    chosen = {name: suite[name] for name in args.sizes or suite}
    about = _about()
    results: dict[str, dict[str, dict[str, Measured]]] = {}
    with Progress() as bar:
        task = bar.add_task("", total=len(chosen) * len(args.only))
        for name, size in chosen.items():
            for case in args.only:
                bar.update(task, description=f"{name} {case}")
                contestants = sides(case)
                pairs = [(module, option) for _, module, option in contestants]
                measured = compare(pairs, case, size, args.rounds)
                labels = [label for label, *_ in contestants]
                results.setdefault(name, {})[case] = dict(zip(labels, measured, strict=True))
                bar.advance(task)
                _write(Path(args.out), about, results, chosen)  # an interruption loses one case
    print(Path(args.out).with_suffix(".md").read_text())


def _write(out: Path, about: dict[str, str], results: dict, sizes: dict[str, Size]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    raw = {
        size: {case: {k: m._asdict() for k, m in one.items()} for case, one in cases.items()}
        for size, cases in results.items()
    }
    out.with_suffix(".json").write_text(json.dumps({**about, "results": raw}, indent=1))
    out.with_suffix(".md").write_text(_page(about, results, sizes))


def _about() -> dict[str, str]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True)
        return done.stdout.strip() or "unknown"

    packages = ("jax", "jaxlib", "torch", "transformers")
    return {
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}",
        "date": str(datetime.date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages),
        "commit": git("rev-parse", "--short", "HEAD"),
    }


def _page(about: dict[str, str], results: dict, sizes: dict[str, Size]) -> str:
    lines = ["# Benchmarks", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [
        "",
        "Both sides run in processes of their own and take turns; medians, and the spread of the "
        "runs (largest less smallest, over the median). *Against the peer* is the rate of the line "
        "over that of the faster `transformers` line. *Of GEMM* counts needed FLOPs only "
        "(`flexolmo_jax/flops.py`), over the machine's own rate as `jnp` reaches it in this run.",
    ]
    for name, cases in results.items():
        c = sizes[name].config
        lines += [
            "",
            f"## {name}: D {c.width}, F {c.ffn_width}, L {c.num_layers}, {c.num_heads} heads, V "
            f"{c.vocab_size}, S {sizes[name].length}, B {sizes[name].batch}, {c.dtype}",
            "",
            "| case | | tokens/s | spread | against the peer | of GEMM | first run | peak memory |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        gemm = flops("gemm", sizes[name]) / cases["gemm"]["jax"].median if "gemm" in cases else 0
        for case, one in cases.items():
            peers = [m.median for label, m in one.items() if label.startswith("transformers")]
            for label, m in one.items():
                work, rate = (
                    flops(case, sizes[name]),
                    f"{tokens(case, sizes[name]) / m.median:,.1f}",
                )
                if case == "gemm":
                    rate = f"{work / m.median / 1e9:,.0f} GFLOP/s"
                ratio = f"{min(peers) / m.median:.2f}x" if peers else ""
                share = f"{work / m.median / gemm:.0%}" if work and gemm else ""
                spread = (max(m.seconds) - min(m.seconds)) / statistics.median(m.seconds)
                lines.append(
                    f"| {case} | {label} | {rate} | {spread:.0%} | {ratio} | {share} | "
                    f"{m.first:.1f} s | {m.peak_bytes / 1e9:.2f} GB |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
