"""What the project wants to reach, and what the table says of it."""

import statistics
from collections.abc import Iterator

from benchmarks.cases import PRODUCTS, YARDSTICK, flops, read_bytes, sides, tokens
from benchmarks.sizes import Size

LAYERS = {"moe_2_2": 1.3, "moe_7_5": 1.3, "moe_8_4": 1.3, "moe_16_2": 1.5, "moe_64_4": 1.5}


def targets(results: dict[str, dict[str, dict]], sizes: dict[str, Size]) -> list[str]:
    """Lines of a table: what, what is wanted, what was found, whether it is enough."""
    lines = [
        "| target | wanted | found | |",
        "| --- | --- | --- | --- |",
    ]
    for name, cases in results.items():
        for what, wanted, found, ok in _rows(cases, sizes[name]):
            lines.append(f"| {name}: {what} | {wanted} | {found} | {'met' if ok else 'missed'} |")
    return lines


def _rows(cases: dict[str, dict], size: Size) -> Iterator[tuple[str, str, str, bool]]:
    seconds = {
        case: {label: statistics.median(m["seconds"]) for label, m in one["sides"].items()}
        for case, one in cases.items()
    }

    def ours(case: str, *labels: str) -> float:
        return min(s for label, s in seconds[case].items() if label in labels)

    def peer(case: str) -> float:
        peers = {side.label for side in sides(case) if side.is_peer}
        return min(s for label, s in seconds[case].items() if label in peers)

    def limit(case: str) -> float:
        """Seconds at the machine's own rate."""
        (yardstick,) = (s for label, s in seconds[case].items() if label.startswith(YARDSTICK))
        if work := flops(case, size):
            return work / flops("gemm", size) * yardstick
        return read_bytes(case, size, "") / read_bytes("stream", size, "") * yardstick

    small = size.config.width < 1024
    steps = (
        ("expert_step", ("ours",), 1.35 if small else 1.15),
        ("anchor_step", ("ours",), 1.25),
        ("merged_forward", ("ours, dense", "ours, grouped"), 1.4),
        ("decode_1", ("ours, float32",), 2.5),
        ("decode_8", ("ours, float32",), 3.0),
    )
    for case, labels, wanted in steps:
        if case in seconds:
            ratio = peer(case) / ours(case, *labels)
            yield f"{case}, against the peer", f"{wanted}x", f"{ratio:.2f}x", ratio >= wanted
    for case, labels, share in (
        ("expert_step", ("ours",), 0.72),
        ("decode_1", ("ours, float32",), 0.75),
        ("decode_8", ("ours, float32",), 0.75),
    ):
        if case in seconds:
            found = limit(case) / ours(case, *labels)
            yield f"{case}, of the machine", f"{share:.0%}", f"{found:.0%}", found >= share
    if "decode_1" in seconds:
        ratio = peer("decode_1") / ours("decode_1", "ours, bfloat16", "ours, int8")
        yield "decode_1 in fewer bits, against the peer", "4x", f"{ratio:.2f}x", ratio >= 4
    for case, wanted in LAYERS.items():
        if case in seconds:
            best = ours(case, "ours, dense", "ours, grouped")
            for what, alone in (("GEMM", limit(case)), (PRODUCTS, seconds[case].get(PRODUCTS))):
                if alone:
                    ratio = best / alone
                    yield (
                        f"{case}, time over that of {what}", f"{wanted}x", f"{ratio:.2f}x",
                        ratio <= wanted,
                    )  # fmt: skip
    if {"moe_8_4", "moe_64_4"} <= seconds.keys():
        ratio, theirs = (
            tokens("moe_64_4", size) / of("moe_64_4") / (tokens("moe_8_4", size) / of("moe_8_4"))
            for of in (lambda case: ours(case, "ours, dense", "ours, grouped"), peer)
        )
        found = f"{ratio:.0%}; transformers {theirs:.0%}"
        yield "moe_64_4, tokens/s over those of moe_8_4", "80%", found, ratio >= 0.8
    if "masks_8" in seconds:
        everyone, off = seconds["masks_8"].values()
        yield (
            "masks_8, time with experts off over all",
            "1",
            f"{off / everyone:.2f}",
            off <= (1.02 * everyone),
        )
