"""What the project wants to reach, and what the table says of it and of the machine's limit."""

import statistics
from collections.abc import Iterator

from benchmarks.cases import PRODUCTS, YARDSTICK, flops, read_bytes, sides, tokens
from benchmarks.sizes import Size

LAYERS = {"moe_2_2": 1.3, "moe_7_5": 1.3, "moe_8_4": 1.3, "moe_16_2": 1.5, "moe_64_4": 1.5}


def targets(results: dict[str, dict[str, dict]], sizes: dict[str, Size]) -> list[str]:
    """Lines of a table: what, what is wanted, what was found, whether it is enough, the limit."""
    lines = [
        "| target | wanted | found | | at the machine's rate | at that of its products |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cases in results.items():
        for what, wanted, found, ok, *limits in _rows(cases, sizes[name]):
            cells = [f"{name}: {what}", wanted, found, "met" if ok else "missed", *limits]
            lines.append(f"| {' | '.join(cells)} |" + " |" * (6 - len(cells)))
    return lines


def _rows(cases: dict[str, dict], size: Size) -> Iterator[tuple]:
    seconds = {
        case: {label: statistics.median(m["seconds"]) for label, m in one["sides"].items()}
        for case, one in cases.items()
    }

    def ours(case: str, *labels: str) -> float:
        return min(s for label, s in seconds[case].items() if label in labels)

    def peer(case: str) -> float:
        peers = {side.label for side in sides(case) if side.is_peer}
        return min(s for label, s in seconds[case].items() if label in peers)

    def limit(case: str, label: str = "") -> float:
        """Seconds at the machine's own rate, for weights as `label` has them."""
        (yardstick,) = (s for label, s in seconds[case].items() if label.startswith(YARDSTICK))
        if work := flops(case, size):
            return work / flops("gemm", size) * yardstick
        return read_bytes(case, size, label) / read_bytes("stream", size, "") * yardstick

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
            limits = [f"{peer(case) / limit(case):.2f}x"]
            if products := seconds[case].get(PRODUCTS):
                limits.append(f"{peer(case) / products:.2f}x")
            yield (
                f"{case}, against the peer", f"{wanted}x", f"{ratio:.2f}x", ratio >= wanted,
                *limits,
            )  # fmt: skip
    for case, labels, share in (
        ("expert_step", ("ours",), 0.72),
        ("decode_1", ("ours, float32",), 0.75),
        ("decode_8", ("ours, float32",), 0.75),
    ):
        if case in seconds:
            found = limit(case) / ours(case, *labels)
            products = seconds[case].get(PRODUCTS)
            limits = ["100%", *([f"{limit(case) / products:.0%}"] if products else [])]
            words = f"{share:.0%}", f"{found:.0%}"
            yield f"{case}, of the machine", *words, found >= share, *limits
    if "decode_1" in seconds:
        ratio = peer("decode_1") / ours("decode_1", "ours, bfloat16", "ours, int8")
        best = peer("decode_1") / limit("decode_1", "ours, int8")
        yield (
            "decode_1 in fewer bits, against the peer", "4x", f"{ratio:.2f}x", ratio >= 4,
            f"{best:.2f}x",
        )  # fmt: skip
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
