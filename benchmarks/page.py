"""The table: Markdown from the results."""

import statistics

from benchmarks.cases import YARDSTICK, flops, read_bytes, sides, tokens
from benchmarks.requirements import targets
from benchmarks.sizes import Size

INTRODUCTION = """\
All sides of a case run in processes of their own and take turns; medians, and the spread of the
runs (largest less smallest, over the median). *Against the peer*: the rate of the line over that of
the faster PyTorch line. *Of the machine*: needed FLOPs only (`flexolmo_jax/modeling/flops.py`; no weight
gradients of what is frozen) over the rate of a plain matrix product, or needed bytes of weights and
cache over the rate of a matrix-vector product, both measured in turn with the case. *First run* is
mostly compiling. *Its products alone*: of a layer, its nine products, forward and backward, each
as one batched product with as many rows for every expert; of a training step, all its products with
weights, one after the other, and nothing else. `load` and `merge` read files that the
system holds in memory. A case whose sides together need more memory
than there is has no lines: at 190M, moe_64_4 and decode_8 need more than 23 GB. Where a run's time
goes, part by part: [profile.md](profile.md)."""

LIMITS = """\
*At the machine's rate*: what the target's figure would be if every needed FLOP ran at the rate of
JAX's large matrix product, or every needed byte at that of its matrix-vector product, and all else
took no time. *At that of its products*: if the step were only its products with weights, at the
shapes that it has. A target above these figures is out of reach on that machine, however the rest
is written."""


def page(about: dict[str, str], results: dict[str, dict[str, dict]], sizes: dict[str, Size]) -> str:
    """Markdown.

    Args:
      about: the command, the machine and so on.
      results: size -> case -> {date, commit, sides: label -> {seconds, first, peak_bytes}}.
      sizes: by name.
    """
    lines = ["# Benchmarks", "", *(f"- {key}: {value}" for key, value in about.items())]
    lines += ["", INTRODUCTION, "", "## Targets", "", *targets(results, sizes), "", LIMITS]
    for name, cases in results.items():
        c, size = sizes[name].config, sizes[name]
        lines += [
            "",
            f"## {name}: D {c.width}, F {c.ffn_width}, L {c.num_layers}, {c.num_heads} heads, V "
            f"{c.vocab_size}, S {size.length}, B {size.batch}, {c.dtype}",
            "",
            "| case | | rate | spread | against the peer | of the machine | first run | memory | "
            "made |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for case, one in cases.items():
            made = f"{one['date']}, {one['commit']}"
            for label in one["sides"]:
                lines.append(f"| {case} | {' | '.join(_cells(case, label, one, size))} | {made} |")
    return "\n".join(lines) + "\n"


def _cells(case: str, label: str, one: dict, size: Size) -> list[str]:
    median = {label: statistics.median(m["seconds"]) for label, m in one["sides"].items()}
    measured, seconds = one["sides"][label], median[label]
    is_peer = {side.label: side.is_peer for side in sides(case)}
    peers = [median[other] for other in median if is_peer.get(other)]
    spread = (max(measured["seconds"]) - min(measured["seconds"])) / seconds
    ratio = f"{min(peers) / seconds:.2f}x" if peers and not label.startswith(YARDSTICK) else ""
    work, read = flops(case, size), read_bytes(case, size, label)
    share = ""
    for yardstick, of in median.items():
        if not yardstick.startswith(YARDSTICK):
            continue
        if label == yardstick:
            case = "gemm" if work else "stream"
            work, read = flops(case, size), read_bytes(case, size, label)
        elif work:
            share = f"{work / seconds / (flops('gemm', size) / of):.0%}"
        elif read:
            share = f"{read / seconds / (read_bytes('stream', size, '') / of):.0%}"
    if case == "gemm":
        rate = f"{work / seconds / 1e9:,.0f} GFLOP/s"
    elif case == "stream":
        rate = f"{read / seconds / 1e9:,.1f} GB/s"
    elif tokens(case, size):
        rate = f"{tokens(case, size) / seconds:,.1f} tokens/s"
    else:
        rate = f"{seconds:.2f} s"
    memory = f"{measured['peak_bytes'] / 1e9:.2f} GB"
    return [label, rate, f"{spread:.0%}", ratio, share, f"{measured['first']:.1f} s", memory]
