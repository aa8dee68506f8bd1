"""The project's speed targets, what was measured, and what the machine would allow."""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.cases import CASES, IN_A_LOOP, MATMULS, YARDSTICK
from benchmarks.sizes import Size

OURS, FLOAT32, COMPUTE = ("ours",), ("ours, float32",), ("ours, dense", "ours, grouped")
LOOP, _ = IN_A_LOOP
LAYERS = {"moe_2_2": 1.3, "moe_7_5": 1.3, "moe_8_4": 1.3, "moe_16_2": 1.5, "moe_64_4": 1.5}


class Target(NamedTuple):
    """A line of the table."""

    what: str
    wanted: str
    found: str
    is_met: bool
    limits: tuple[str, ...] = ()  # at the machine's rate, and at that of the matmuls


class Measured:
    """Of one size: medians in seconds, seconds of first runs, and bytes of memory."""

    def __init__(self, cases: dict[str, dict], size: Size):
        self.size = size
        self.seconds = _of_sides(cases, lambda m: statistics.median(m["seconds"]))
        self.first = _of_sides(cases, lambda m: m["first"])
        self.bytes = _of_sides(cases, lambda m: m["peak_bytes"] - m["library_bytes"])

    def ours(self, case: str, labels: tuple[str, ...]) -> float:
        """The fastest of our sides."""
        return min(s for label, s in self.seconds[case].items() if label in labels)

    def baseline(self, case: str, kind: str = "seconds") -> float:
        """The PyTorch side with the least of `seconds`, `first` or `bytes`."""
        labels = {side.label for side in CASES[case].sides() if side.is_pytorch}
        return min(x for label, x in getattr(self, kind)[case].items() if label in labels)

    def matmuls(self, case: str) -> float | None:
        """The matmuls of the case alone, if they were measured."""
        return self.seconds[case].get(MATMULS)

    def limit(self, case: str, label: str = "") -> float:
        """The case at the machine's own rate, with weights in the form of `label`."""
        timed = self.seconds[case].items()
        (yardstick,) = (s for side, s in timed if side.startswith(YARDSTICK))
        if work := CASES[case].flops(self.size):
            return work / CASES["gemm"].flops(self.size) * yardstick
        read = CASES[case].read_bytes(self.size, label)
        return read / CASES["stream"].read_bytes(self.size, "") * yardstick


def _of_sides(cases: dict[str, dict], read: Callable[[dict], float]) -> dict[str, dict]:
    return {
        case: {label: read(measured) for label, measured in result["sides"].items()}
        for case, result in cases.items()
    }


def targets(results: dict[str, dict[str, dict]], sizes: dict[str, Size]) -> list[str]:
    """Lines of a Markdown table.

    Args:
      results: size -> case -> {"sides": label -> {"seconds": [...]}}.
      sizes: by name.
    """
    lines = [
        "| target | wanted | found | | at the machine's rate | at that of its matmuls |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cases in results.items():
        measured = Measured(cases, sizes[name])
        for of_kind in KINDS:
            for target in of_kind(measured):
                verdict = "met" if target.is_met else "missed"
                cells = [f"{name}: {target.what}", target.wanted, target.found, verdict]
                cells += target.limits
                lines.append(f"| {' | '.join(cells)} |" + " |" * (6 - len(cells)))
    return lines


def _speedups(measured: Measured) -> Iterator[Target]:
    is_small = measured.size.config.width < 1024
    for case, labels, wanted in (
        ("expert_step", OURS, 1.35 if is_small else 1.15),
        ("anchor_step", OURS, 1.25),
        ("merged_forward", COMPUTE, 1.4),
        ("decode_1", FLOAT32, 2.5),
        ("decode_8", FLOAT32, 3.0),
    ):
        if case not in measured.seconds:
            continue
        baseline, matmuls = measured.baseline(case), measured.matmuls(case)
        ratio = baseline / measured.ours(case, labels)
        limits = [f"{baseline / measured.limit(case):.2f}x"]
        limits += [f"{baseline / matmuls:.2f}x"] if matmuls else []
        what = f"{case}, speedup over PyTorch"
        yield Target(what, f"{wanted}x", f"{ratio:.2f}x", ratio >= wanted, tuple(limits))


def _fractions_of_peak(measured: Measured) -> Iterator[Target]:
    for case, labels, wanted in (
        ("expert_step", OURS, 0.78),
        ("decode_1", FLOAT32, 0.75),
        ("decode_1", ("ours, bfloat16",), 0.85),
        ("decode_1", ("ours, int8",), 0.75),
        ("decode_8", FLOAT32, 0.75),
        ("decode_8", ("ours, int8",), 0.65),
    ):
        if case not in measured.seconds:
            continue
        limit, matmuls = measured.limit(case, labels[0]), measured.matmuls(case)
        found = limit / measured.ours(case, labels)
        limits = ("100%", *([f"{limit / matmuls:.0%}"] if matmuls else []))
        what = f"{_named(case, labels[0])}, fraction of peak"
        yield Target(what, f"{wanted:.0%}", f"{found:.0%}", found >= wanted, limits)


def _named(case: str, label: str) -> str:
    return f"{case}{label.removeprefix('ours')}"


def _no_more_than_pytorch(measured: Measured) -> Iterator[Target]:
    for kind, what, case, label, wanted in (
        ("first", "first run", "expert_step", LOOP, 1.3),
        ("first", "first run", "decode_1", "ours, float32", 1.0),
        ("bytes", "memory", "expert_step", LOOP, 1.0),
        ("bytes", "memory", "expert_step", "ours", 1.0),
        ("bytes", "memory", "merged_forward", "ours, grouped", 1.3),
        ("bytes", "memory", "decode_1", "ours, float32", 1.25),
        ("seconds", "time", "load", "ours", 1.0),
    ):
        if case in measured.seconds:
            ratio = getattr(measured, kind)[case][label] / measured.baseline(case, kind)
            name = f"{_named(case, label)}, {what} over that of PyTorch"
            yield Target(name, f"{wanted}x", f"{ratio:.2f}x", ratio <= wanted)


def _int8_memory(measured: Measured) -> Iterator[Target]:
    for case in ("decode_1", "decode_8"):
        if case not in measured.bytes:
            continue
        ratio = measured.bytes[case]["ours, int8"] / measured.bytes[case]["ours, bfloat16"]
        what = f"{case}, memory of int8 over that of bfloat16"
        yield Target(what, "1x", f"{ratio:.2f}x", ratio <= 1)


def _requests(measured: Measured) -> Iterator[Target]:
    if "requests_64" not in measured.seconds:
        return
    engine, batches = measured.seconds["requests_64"]["ours, engine"], "ours, static batches"
    for what, other, wanted in (
        ("our own static batches", measured.seconds["requests_64"][batches], 1.5),
        ("PyTorch", measured.baseline("requests_64"), 2.5),
    ):
        name = f"requests_64, speedup over {what}"
        yield Target(name, f"{wanted}x", f"{other / engine:.2f}x", other / engine >= wanted)
    if "decode_16" in measured.seconds:
        rate = CASES["requests_64"].tokens(measured.size) / engine
        full = CASES["decode_16"].tokens(measured.size) / measured.ours("decode_16", FLOAT32)
        what = "requests_64, tokens/s over those of decode_16"
        yield Target(what, "80%", f"{rate / full:.0%}", rate / full >= 0.8)


def _few_bits(measured: Measured) -> Iterator[Target]:
    if "decode_1" not in measured.seconds:
        return
    baseline = measured.baseline("decode_1")
    ratio = baseline / measured.ours("decode_1", ("ours, bfloat16", "ours, int8"))
    limit = f"{baseline / measured.limit('decode_1', 'ours, int8'):.2f}x"
    what = "decode_1 in fewer bits, speedup over PyTorch"
    yield Target(what, "4x", f"{ratio:.2f}x", ratio >= 4, (limit,))


def _layers(measured: Measured) -> Iterator[Target]:
    for case, wanted in LAYERS.items():
        if case not in measured.seconds:
            continue
        ours, matmuls = measured.ours(case, COMPUTE), measured.matmuls(case)
        for what, alone in (("GEMM", measured.limit(case)), ("its matmuls alone", matmuls)):
            if alone:
                ratio, name = ours / alone, f"{case}, time over that of {what}"
                yield Target(name, f"{wanted}x", f"{ratio:.2f}x", ratio <= wanted)


def _scaling(measured: Measured) -> Iterator[Target]:
    if not {"moe_8_4", "moe_64_4"} <= measured.seconds.keys():
        return
    # Both layers read as many tokens.
    ratio = measured.ours("moe_8_4", COMPUTE) / measured.ours("moe_64_4", COMPUTE)
    theirs = measured.baseline("moe_8_4") / measured.baseline("moe_64_4")
    found = f"{ratio:.0%}; transformers {theirs:.0%}"
    yield Target("moe_64_4, tokens/s over those of moe_8_4", "80%", found, ratio >= 0.8)


def _masks(measured: Measured) -> Iterator[Target]:
    if "masks_8" in measured.seconds:
        everyone, masked = measured.seconds["masks_8"].values()
        ratio = masked / everyone
        what = "masks_8, time with experts off over all"
        yield Target(what, "1", f"{ratio:.2f}", ratio <= 1.02)


KINDS = (
    *(_speedups, _fractions_of_peak, _few_bits, _no_more_than_pytorch, _int8_memory, _requests),
    *(_layers, _scaling, _masks),
)
