"""Plans of the full-size stages on TPU slices, and how they grow; writes docs/scaling.md.

    .venv/bin/pip install -e '.[plan]'
    .venv/bin/python docs/scaling.py [--only WORD ...]

No TPU is needed: everything is compiled ahead of time, about a minute each. Plans that are in
docs/scaling.json already are kept unless --only names them.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.progress import track

from flexolmo_jax.cli import leave_libtpu_alone

leave_libtpu_alone()  # before JAX is imported

from flexolmo_jax.config import Training, load_config  # noqa: E402
from flexolmo_jax.planning.plan import make_plan, model_of  # noqa: E402

HERE = Path(__file__).parent
PAGE, RECORD = HERE / "scaling.md", HERE / "scaling.json"
SLICES = ("v5p:4x4x4", "v5p:4x8x8", "v5e:16x16", "v6e:8x8")
TOKENS = 4 * 2**20  # of a step, in sequences of 4096
STAGES = {  # title: config, stage, what is set
    "7B anchor": ("olmo2_7b_anchor", "anchor", {}),
    "2x7B expert, pair": ("flexolmo_2x7b_expert", "expert", {}),
    "2x7B expert, alone": ("flexolmo_2x7b_expert", "expert", {"gating": "alone"}),
    "7x7B router": ("flexolmo_7x7b_router", "router", {}),
    "8x7B forward": ("flexolmo_8x7b_router", "forward", {"expert_compute": "grouped"}),
    "8x7B decode": ("flexolmo_8x7b_router", "decode", {"expert_parallel": 8}),
}
# What fits, and computes least again: sequences that a chip works on at a time, and what is kept.
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {}
GROWTH_CHIPS = ("v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8")
GROWTH_EXPERTS = (2, 4, 8, 16, 32, 64)


def jobs() -> dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]]:
    """Name of a plan: config, stage, topology, values of the config, values of its model."""
    made: dict[str, Any] = {}
    for title, (config, stage, values) in STAGES.items():
        for topology in SLICES:
            chosen = values | SETTINGS.get((title, topology), {})
            made[f"{title} on {topology}"] = (config, stage, topology, chosen, {})
    for topology in GROWTH_CHIPS:
        name = f"growth of chips: {topology}"
        chosen = dict(STAGES["2x7B expert, pair"][2])
        chosen |= SETTINGS.get(("2x7B expert, pair", "v5p:4x4x4"), {})
        made[name] = ("flexolmo_2x7b_expert", "expert", topology, chosen, {})
    for count in GROWTH_EXPERTS:
        name = f"growth of experts: {count}"
        chosen = {"expert_compute": "grouped", "expert_parallel": count}
        model = {"num_experts": count, "active_experts": 2}
        made[name] = ("flexolmo_8x7b_router", "forward", "v5p:4x4x4", chosen, model)
    return made


def plan(job: tuple[str, str, str, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """One plan, or why there is none; in a process of its own."""
    path, stage, topology, values, of_model = job
    config = load_config(path, Training)
    rows = 256 if stage == "decode" else TOKENS // 4096
    data = dataclasses.replace(config.data, batch_size=rows)
    steps = round(config.steps * config.data.batch_size / rows)
    config = dataclasses.replace(config, data=data, steps=steps, **values)
    model = dataclasses.replace(model_of(path, config), **of_model)
    try:
        return make_plan(config, model, stage, topology).values()
    except Exception as error:
        return {"error": str(error).splitlines()[0][:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="plans whose name has one of them"
    )
    args = parser.parse_args()
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    wanted = jobs()
    found = {name: found[name] for name in wanted if name in found}
    chosen = [
        name for name in wanted
        if (any(word in name for word in args.only) if args.only else name not in found)
    ]  # fmt: skip
    for name in track(chosen, "plans"):
        # A process for each: the compiler keeps its memory, and may end its process.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            made = pool.submit(plan, wanted[name]).result()
        found[name] = {
            "date": str(datetime.date.today()), "set": wanted[name][3], **made
        }  # fmt: skip
        ordered = {name: found[name] for name in wanted if name in found}
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n")
        PAGE.write_text(page(ordered))
    pictures(found)


HEADER = """\
| stage | chips | set | verdict | peak, GiB | overhead | roofline, s | bound by | MFU | tokens/s \
| days | compiled in | made |
| --- | --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |
"""
PAGE_TEXT = """\
# Full size on TPU slices, compiled ahead of time

`python docs/scaling.py`, {cores} cores ({machine}), without a TPU. The real step of each stage,
compiled by libtpu for the slice; nothing here has run. Bytes, FLOPs and collectives are read off
the compiled program, layers counted as often as they run (`flexolmo_jax/planning`). *Overhead*:
compiled over needed FLOPs. *Roofline*: the longest of compute, HBM and links at published peak
rates (`planning/chips.py`), as if the others hid behind it; *MFU* is needed FLOPs at that time, so
an upper bound. Training steps and forward passes are of 4M tokens; decoding is one more token of
256 sequences with 4096 tokens each.

{stages}
## Growth

![chips](scaling_chips.png) ![experts](scaling_experts.png)

Left: the 2x7B expert step of 4M tokens on 16 to 256 v5p chips. Right: a forward pass of 4M tokens
through 2 to 64 experts, two of them active, on 64 v5p chips.

{growth}"""


def page(found: dict[str, dict[str, Any]]) -> str:
    rows = {name: row(name, one) + "\n" for name, one in found.items()}
    growth = [text for name, text in rows.items() if name.startswith("growth")]
    stages = [text for name, text in rows.items() if not name.startswith("growth")]
    return PAGE_TEXT.format(
        cores=os.cpu_count(), machine=platform.machine(),
        stages=HEADER + "".join(stages), growth=HEADER + "".join(growth),
    )  # fmt: skip


def row(name: str, one: dict[str, Any]) -> str:
    title, _, topology = name.partition(" on ")
    made = ", ".join(f"{key} {value}" for key, value in one["set"].items())
    if "error" in one:
        return f"| {title} | {topology} | {made} | {one['error']} |" + " |" * 9
    start = f"| {title} | {one['topology']} | {made} | {one['verdict']} | "
    end = f"{one['compile_seconds']:.0f} s | {one['date']} |"
    if not one["peak"]:
        return start + " | " * 7 + end
    times = {name: one[f"{name}_seconds"] for name in ("compute", "hbm", "link")}
    days = f"{one['days']:.1f}" if one["steps"] else ""
    return (
        f"{start}{one['peak'] / 2**30:.1f} of {one['memory'] / 2**30:.0f} | "
        f"{one['compiled_flops'] / one['needed_flops']:.2f} | {one['seconds']:.3g} | "
        f"{max(times, key=times.get)} | {one['mfu']:.0%} | {one['tokens_per_second']:,.0f} | "
        f"{days} | {end}"
    )


def pictures(found: dict[str, dict[str, Any]]) -> None:
    for what, label in (("chips", "chips"), ("experts", "experts")):
        points = [one for name, one in found.items() if name.startswith(f"growth of {what}")]
        points = [one for one in points if one.get("peak")]
        if not points:
            continue
        numbers = (
            [one["chips"] for one in points] if what == "chips"
            else [int(n.split()[-1]) for n, one in found.items()
                  if n.startswith("growth of experts") and one.get("peak")]
        )  # fmt: skip
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        left = figure.subplots()
        right = left.twinx()
        left.plot(numbers, [one["seconds"] for one in points], "o-", label="roofline time")
        right.plot(numbers, [one["peak"] / 2**30 for one in points], "s--", color="tab:red")
        left.set(xlabel=label, ylabel="roofline time of a step, s (solid)", xscale="log")
        left.set(yscale="log" if what == "chips" else "linear")
        left.set_xticks(numbers, map(str, numbers))
        left.minorticks_off()
        left.set_ylim(bottom=None if what == "chips" else 0)
        right.set(ylabel="peak memory of a chip, GiB (dashed)", ylim=(0, None))
        figure.savefig(HERE / f"scaling_{what}.png", dpi=110)


if __name__ == "__main__":
    main()
