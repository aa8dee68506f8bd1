"""The table of a device: plain text of 80 columns."""

import statistics
from typing import Any

from benchmarks.cases import Case
from benchmarks.device.sections import DEVICE_CASES, FIRST, OURS, PARITY, SIZES, THEIRS
from benchmarks.sizes import Size

WIDTH = 80
PEAKS = {"H100": 989e12, "H200": 989e12}  # dense bfloat16, FLOP/s, by the vendor's data sheet
TARGETS = {  # speedup over transformers, and fraction of the peak; 0 is none
    "expert_step": (1.5, 0.45),
    "decode_1": (3.0, 0.0),
    "decode_64": (3.0, 0.0),
}
TITLES = {
    "gemm": "large matrix product",
    "stream": "large matrix-vector product",
    "expert_step": "training step of an expert beside the frozen anchor",
    "anchor_step": "training step of the anchor",
    "merged_layers": "layers of a merged model, no head",
    **{f"decode_{n}": f"greedy decoding, batch {n}" for n in (1, 8, 64)},
}


def page(record: dict[str, Any]) -> str:
    """The table.

    Args:
      record: about the run, and its results: case -> label -> what was measured: "checks" of
        parity; "seconds", "first", "since_start" and "peak_bytes" of others; or "failed".
    """
    size, results = SIZES[record["size"]], record["results"]
    c = size.config
    lines = [
        *_wrapped(record["gpu"] or record["machine"]),
        *_wrapped(f"{record['versions']}; code {record['commit']}, {record['date']}"),
        *_wrapped(
            f"D {c.width}, F {c.ffn_width}, L {c.num_layers}, V {c.vocab_size}, {c.dtype}; steps "
            f"of {size.batch} x {size.length} tokens; merged: {size.active} of {size.experts} "
            f"experts; prompts of {size.prompt} tokens, {size.new_tokens} new"
        ),
    ]
    if PARITY in results:
        lines += ["", "Parity with transformers in float32 on the CPU: relative errors"]
        lines += [x for side in results[PARITY].items() for x in _checks(*side)]
    peak, what = _peak(record)
    for name, case in DEVICE_CASES.items():
        if name in results:
            rate_of = "bandwidth" if case.read_bytes(size, "") else what
            lines += ["", f"{TITLES[name]}; of {rate_of}"] if rate_of else ["", TITLES[name]]
            lines.append(_row("", "rate", "speedup", "of peak", "memory", "first"))
            lines += _sides(name, case, size, results, peak)
    if FIRST in results:
        lines += ["", "first 16 tokens, from the start of the process"]
        for label, found in results[FIRST].items():
            lines += _failed(label, found) or [_row(label, f"{found['since_start']:.1f} s")]
    lines += ["", f"{record['wall_seconds']} s in all"]
    return "\n".join(lines) + "\n"


def _checks(side: str, found: dict[str, Any]) -> list[str]:
    return _failed(side, found) or [
        f"  {side + ': ' + what:<58}{value:>15}{'' if is_good else ' !!':<4}".rstrip()
        for what, value, is_good in found["checks"]
    ]


def _peak(record: dict[str, Any]) -> tuple[float, str]:
    """FLOP/s that fractions are of, and their name: the data sheet's, or of a measured product."""
    for name, peak in PEAKS.items():
        if name in record["gpu"]:
            return peak, f"{peak / 1e12:.0f} TFLOP/s"
    gemm = record["results"].get("gemm", {}).get("the device", {})
    if "seconds" not in gemm:
        return 0.0, ""
    size = SIZES[record["size"]]
    return DEVICE_CASES["gemm"].flops(size) / statistics.median(gemm["seconds"]), "GEMM"


def _sides(name: str, case: Case, size: Size, results: dict, peak: float) -> list[str]:
    medians = {
        label: statistics.median(found["seconds"])
        for label, found in results[name].items()
        if "seconds" in found
    }
    theirs = min((s for label, s in medians.items() if label.startswith(THEIRS)), default=None)
    stream = results.get("stream", {}).get("the device", {}).get("seconds")
    lines, best = [], (0.0, 0.0)
    for label, found in results[name].items():
        if label not in medians:
            lines += _failed(label, found)
            continue
        seconds, work = medians[label], case.flops(size)
        read = 0.0 if work else case.read_bytes(size, "ours, bfloat16")
        share = work / seconds / peak if work and peak else 0.0
        if read and stream and name != "stream":
            share = (
                read / seconds * statistics.median(stream)
                / DEVICE_CASES["stream"].read_bytes(size, "")
            )  # fmt: skip
        speedup = theirs / seconds if theirs else 0.0
        if label.startswith(OURS):
            best = max(best, (speedup, share))
        lines.append(
            _row(
                label, _rate(name, case, size, seconds),
                f"{speedup:.2f}x" if speedup else "", f"{share:.0%}" if share else "",
                f"{found['peak_bytes'] / 1e9:.1f} GB", f"{found['first']:.1f} s",
            )
        )  # fmt: skip
    return lines + _target(name, best)


def _rate(name: str, case: Case, size: Size, seconds: float) -> str:
    if name == "gemm":
        return f"{case.flops(size) / seconds / 1e12:,.2f} TFLOP/s"
    if name == "stream":
        return f"{case.read_bytes(size, '') / seconds / 1e9:,.0f} GB/s"
    if name == "merged_layers":
        return f"{1e3 * seconds / size.config.num_layers:,.2f} ms a layer"
    return f"{case.tokens(size) / seconds:,.0f} tokens/s"


def _target(name: str, found: tuple[float, float]) -> list[str]:
    """Whether our best side reaches the target, where there is one and both sides were measured."""
    if name not in TARGETS or not found[0]:
        return []
    pairs = zip(("speedup", "of peak"), TARGETS[name], found, strict=True)
    is_met = all(value >= wanted for _, wanted, value in pairs)
    wanted = ", ".join(
        f"{what} {value:.0%}" if what == "of peak" else f"{what} {value}x"
        for what, value in zip(("speedup", "of peak"), TARGETS[name], strict=True)
        if value
    )
    return [f"  target: {wanted}: {'met' if is_met else 'missed'}"]


def _failed(label: str, found: dict[str, Any]) -> list[str]:
    if "failed" not in found:
        return []
    return [f"  {label}: not measured: {found['failed']}"[:WIDTH]]


def _row(label: str, *cells: str) -> str:
    widths = (18, 9, 8, 9, 9)
    padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
    return f"  {label:<25}{''.join(padded)}".rstrip()


def _wrapped(text: str) -> list[str]:
    """Lines of at most WIDTH columns."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
