"""Plans of the full-size stages on TPU slices, and how they grow; writes docs/scaling.md.

    .venv/bin/pip install -e '.[plan]'
    .venv/bin/python flexolmo_jax/studies/scaling.py [--only WORD ...] [--check]

No TPU is needed: everything is compiled ahead of time, about a minute each. Plans that are in
docs/scaling.json already are kept unless --only names them. With --check, those in CHECKED are made
again, with the JAX that runs this, beside what is kept: does it still hold?
"""

import argparse
import concurrent.futures.process
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.progress import track

from flexolmo_jax.runtime.startup import leave_libtpu_alone

leave_libtpu_alone()  # before JAX is imported

from flexolmo_jax.config import Training, load_config  # noqa: E402
from flexolmo_jax.planning.chips import chip_of  # noqa: E402
from flexolmo_jax.planning.plan import make_plan, model_of  # noqa: E402

HERE = Path(__file__).parent
PAGE, RECORD = HERE / "scaling.md", HERE / "scaling.json"
CHECKS = HERE / "scaling_checks.json"  # name of a plan: version of JAX: the plan
CHECKED = ("growth of chips: v5p:2x4x4", "8x7B forward on v5e:16x16", "8x7B decode on v5e:16x16")
SLICES = ("v5p:4x4x4", "v5p:4x8x8", "v5e:16x16", "v6e:8x8")
ROWS, ROWS_DECODED = 1024, 256  # sequences: of a step, 4M tokens; of a turn of decoding
STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {  # title: config, stage, what is set
    "7B anchor": ("olmo2_7b_anchor", "anchor", {}),
    "2x7B expert, pair": ("flexolmo_2x7b_expert", "expert", {}),
    "2x7B expert, alone": ("flexolmo_2x7b_expert", "expert", {"gating": "fixed"}),
    "7x7B router": ("flexolmo_7x7b_router", "router", {}),
    "8x7B forward": ("flexolmo_8x7b_router", "forward", {"expert_compute": "grouped"}),
    "8x7B decode": ("flexolmo_8x7b_router", "decode", {"expert_parallel": 8}),
}
# What fits, and computes least again: sequences that a chip works on at a time, and what is kept.
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("7B anchor", "v5p:4x4x4"): {"microbatches": 8, "remat": "matmuls"},
    ("7B anchor", "v5p:4x8x8"): {"microbatches": 2, "remat": "matmuls"},
    ("7B anchor", "v5e:16x16"): {"microbatches": 4, "remat": "matmuls"},
    ("7B anchor", "v6e:8x8"): {"microbatches": 8, "remat": "matmuls"},
    ("2x7B expert, pair", "v5p:4x4x4"): {"microbatches": 8, "remat": "matmuls"},
    ("2x7B expert, pair", "v5p:4x8x8"): {"microbatches": 2, "remat": "matmuls"},
    ("2x7B expert, pair", "v5e:16x16"): {"microbatches": 4, "remat": "wide_matmuls"},
    ("2x7B expert, pair", "v6e:8x8"): {"microbatches": 16, "remat": "matmuls"},
    ("2x7B expert, alone", "v5p:4x4x4"): {"microbatches": 8, "remat": "matmuls"},
    ("2x7B expert, alone", "v5p:4x8x8"): {"microbatches": 2, "remat": "matmuls"},
    ("2x7B expert, alone", "v5e:16x16"): {"microbatches": 4, "remat": "matmuls"},
    ("2x7B expert, alone", "v6e:8x8"): {"microbatches": 8, "remat": "matmuls"},
    ("7x7B router", "v5p:4x4x4"): {"microbatches": 16, "remat": "matmuls"},
    ("7x7B router", "v5p:4x8x8"): {"microbatches": 4, "remat": "matmuls"},
    ("7x7B router", "v5e:16x16"): {"microbatches": 4, "remat": "wide_matmuls"},
    ("7x7B router", "v6e:8x8"): {"microbatches": 16, "remat": "wide_matmuls"},
}
# What would compute less again, but does not fit.
TRIED: list[tuple[str, str, dict[str, Any]]] = [
    ("2x7B expert, pair", "v5e:16x16", {"microbatches": 4, "remat": "matmuls"}),
    ("7x7B router", "v5e:16x16", {"microbatches": 4, "remat": "matmuls"}),
    ("7x7B router", "v6e:8x8", {"microbatches": 16, "remat": "matmuls"}),
]
GROWTH_CHIPS = ("v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8")
GROWTH_EXPERTS = (2, 4, 8, 16, 32, 64)
# What the issue asks of each plan: words; whom it concerns, its value in words, whether it is met.
Target = tuple[Callable[[dict], Any], Callable[[dict], str], Callable[[dict], bool]]
TARGETS: dict[str, Target] = {
    "compile in at most 150 s on 2 cores": (
        lambda one: True, lambda one: f"{one['compile_seconds']:.0f} s",
        lambda one: one["compile_seconds"] <= 150,
    ),
    "fit in the chip's memory, GiB": (
        lambda one: True, lambda one: reason(one), lambda one: one["fits"]
    ),
    "training, forward: compiled FLOPs at most 1.35x the needed": (
        lambda one: one["peak"] and one["stage"] != "decode", lambda one: f"{overhead(one):.2f}x",
        lambda one: overhead(one) <= 1.35,
    ),
    "training: MFU at the roofline at least 55%": (
        lambda one: one["peak"] and one["steps"], lambda one: f"{one['mfu']:.0%}",
        lambda one: one["mfu"] >= 0.55,
    ),
}  # fmt: skip


def jobs() -> dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]]:
    """Name of a plan: config, stage, topology, values of the config, values of its model."""
    made: dict[str, Any] = {}
    for title, (config, stage, values) in STAGES.items():
        for topology in SLICES:
            chosen = values | SETTINGS.get((title, topology), {})
            made[f"{title} on {topology}"] = (config, stage, topology, chosen, {})
    for title, topology, chosen in TRIED:
        config, stage, values = STAGES[title]
        made[f"tried: {title} on {topology}"] = (config, stage, topology, values | chosen, {})
    for topology in GROWTH_CHIPS:  # each chip works on two sequences at a time, wherever
        chosen = {"microbatches": ROWS // 2 // chip_of(topology)[1], "remat": "matmuls"}
        name = f"growth of chips: {topology}"
        made[name] = ("flexolmo_2x7b_expert", "expert", topology, chosen, {})
    for count in GROWTH_EXPERTS:
        model = {"num_experts": count, "active_experts": 2}
        made[f"growth of experts: {count}"] = (
            "flexolmo_8x7b_router", "forward", "v5p:4x4x4", {"expert_compute": "grouped"}, model
        )  # fmt: skip
    return made


def plan(job: tuple[str, str, str, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """One plan, or why there is none; in a process of its own."""
    path, stage, topology, values, of_model = job
    config = load_config(path, Training)
    rows = ROWS_DECODED if stage == "decode" else ROWS
    data = dataclasses.replace(config.data, batch_size=rows)
    steps = round(config.steps * config.data.batch_size / rows)
    config = dataclasses.replace(config, data=data, steps=steps, **values)
    model = dataclasses.replace(model_of(path, config), **of_model)
    try:
        return make_plan(config, model, stage, topology).values()
    except Exception as error:
        return {"error": str(error).splitlines()[0][:300]}


def in_a_process(job: tuple[str, str, str, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """A process for each plan: the compiler keeps its memory, and may end its process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            made = pool.submit(plan, job).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            made = {"error": str(error)}
    return {"date": str(datetime.date.today()), "set": job[3], **made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="plans whose name has one of them"
    )
    parser.add_argument(
        "--check", action="store_true", help="make those in CHECKED again, with this JAX"
    )
    args = parser.parse_args()
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    wanted = jobs()
    found = {name: found[name] for name in wanted if name in found}
    if args.check:
        checks = json.loads(CHECKS.read_text()) if CHECKS.exists() else {}
        version = importlib.metadata.version("jax")
        for name in track(CHECKED, "checks"):
            checks.setdefault(name, {})[version] = in_a_process(wanted[name])
            CHECKS.write_text(json.dumps(checks, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(found))
        return
    chosen = [
        name for name in wanted
        if (any(word in name for word in args.only) if args.only else name not in found)
    ]  # fmt: skip
    done: set[str] = set()
    for name in track(chosen, "plans"):
        if name in done:
            continue
        same = [one for one in wanted if wanted[one] == wanted[name]]
        found |= dict.fromkeys(same, in_a_process(wanted[name]))
        done.update(same)
        ordered = {name: found[name] for name in wanted if name in found}
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n")
        PAGE.write_text(page(ordered))
    pictures(found)


NAMES = {"compute": "compute", "hbm": "memory (HBM)", "link": "links"}
HEADER = """\
| stage | slice | set | peak of memory, GiB | overhead | roofline, s | bound by | MFU \
| MFU, links in turn | tokens/s | days | compiled in |
| --- | --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |
"""
PAGE_TEXT = """\
# Full size on TPU slices, compiled ahead of time

`python flexolmo_jax/studies/scaling.py`, on {cores} cores ({machine}) without a TPU, {dates}. libtpu compiles the
real step of each stage for the slice; **nothing here has run**, so no time here was measured but
that of compiling. Memory is the compiler's own account. FLOPs, bytes and collectives are read off
the compiled program, its loops counted as often as they run (`flexolmo_jax/planning`).

## Targets

| of the {count} plans below | met | missed |
| --- | ---: | --- |
{targets}
## Stages

A training step and a forward pass are of 4M tokens, in sequences of 4096; decoding is one more
token of 256 sequences that have 4096 each.

{stages}
- *set*: `microbatches` is into how many a chip divides its share of the batch, one worked on after the
  other; `remat` is what the backward pass computes again: all but matrix products; "wide": also
  the products that are wider than the model; whole layers.
- *overhead*: compiled FLOPs (matrix products and attention) over needed ones, as in
  `flexolmo_jax/modeling/flops.py`: nothing computed twice, no gradient of a frozen weight, no masked score.
- *roofline*: the longest of the times that compute, HBM and links need at their published peak
  rates (`planning/chips.py`), as if the others hid behind it. *MFU* is needed FLOPs at that time:
  an upper bound. *MFU, links in turn* is the same if no transfer hides behind anything.
- *days*: the whole stage, as many tokens as its config in `configs/` says.
- *bound by* HBM: its bytes are those of every operand and result, as if nothing that one operation
  leaves stayed on the chip for the next.

What would compute less again, but was not taken:

{tried}
## Other versions of JAX

The plans above were made with JAX 0.10.2 and libtpu 0.0.52, by a reading of XLA's text that missed
transfers which the compiler spreads over several fusions, as it may on v5e. Some of them again
(`python flexolmo_jax/studies/scaling.py --check`), as it is read now, from XLA's protobuf:

{checks}
Bytes of HBM differ by {bytes} at most from those above. {links}

## Growth

![chips](scaling_chips.png) ![experts](scaling_experts.png)

Left: the 2x7B expert step of 4M tokens; each chip works on two sequences at a time. {chips}

Right: a forward pass of 4M tokens, two experts of each token active, on 64 chips; what all chips
hold grows with the experts, and so does what each receives to put a layer together. {experts}

{growth}"""


def page(found: dict[str, dict[str, Any]]) -> str:
    rows = {name: row(name, one) + "\n" for name, one in found.items()}
    plans = {name: one for name, one in found.items() if ":" not in name.split(" on ")[0]}

    def table(start: str) -> str:
        return HEADER + "".join(text for name, text in rows.items() if name.startswith(start))

    dates = sorted({one["date"] for one in found.values()})
    return PAGE_TEXT.format(
        cores=os.cpu_count(), machine=platform.machine(),
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))), count=len(plans),
        targets="".join(target(words, plans) for words in TARGETS),
        stages=HEADER + "".join(rows[name] for name in plans), tried=table("tried"),
        growth=table("growth"), chips=growing(found, "chips"), experts=growing(found, "experts"),
        **checked(found),
    )  # fmt: skip


def checked(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The table of plans that were made again, and how far they are from what is kept."""
    rows = [
        "| plan | JAX | compiled FLOPs, T | bytes of HBM, GB | bytes received, GB | roofline, s "
        "| peak of memory, GiB |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
    ]
    apart, links = [0.0], [0.0]
    for name, made in json.loads(CHECKS.read_text()).items() if CHECKS.exists() else ():
        kept = found[name]
        for version, one in {"above": kept, **made}.items():
            received = sum(one["collectives"].values()) / 1e9
            rows.append(
                f"| {name} | {version} | {one['compiled_flops'] / 1e12:,.3f} "
                f"| {one['hbm_bytes'] / 1e9:,.2f} | {received:,.2f} | {one['seconds']:.3g} "
                f"| {one['peak'] / 2**30:.2f} |\n"
            )
            apart.append(abs(one["hbm_bytes"] / kept["hbm_bytes"] - 1))
            links.append(one["link_seconds"] / kept["link_seconds"] - 1)
    words = (
        f"Of these, the plan that changes most receives {max(links):.0%} more than is said above."
        if max(links) > 0.005 else "What is received is as above."
    )  # fmt: skip
    return {"checks": "".join(rows), "bytes": f"{max(apart):.1%}", "links": words}


def growing(found: dict[str, dict[str, Any]], what: str) -> str:
    """From the first to the last plan of a growth: time and memory, in words."""
    plans = [one for name, one in found.items() if name.startswith(f"growth of {what}")]
    plans = [one for one in plans if one.get("peak")]
    if len(plans) < 2:
        return ""
    (few, many), gib = (plans[0], plans[-1]), 2**30
    ends = GROWTH_EXPERTS if what == "experts" else [few["chips"], many["chips"]]
    return (
        f"From {ends[0]} to {ends[-1]} {what}: {few['seconds']:.3g} to {many['seconds']:.3g} s, "
        f"peak {few['peak'] / gib:.1f} to {many['peak'] / gib:.1f} GiB."
    )


def target(words: str, plans: dict[str, dict[str, Any]]) -> str:
    """A row: how many plans meet a target, and which do not."""
    concerns, value, is_met = TARGETS[words]
    asked = {name: one for name, one in plans.items() if "error" not in one and concerns(one)}
    missed = [f"{name} ({value(one)})" for name, one in asked.items() if not is_met(one)]
    missed += [f"{name} (not planned)" for name, one in plans.items() if "error" in one]
    met = sum(map(is_met, asked.values()))
    return f"| {words} | {met} of {len(asked)} | {'; '.join(missed) or 'none'} |\n"


def row(name: str, one: dict[str, Any]) -> str:
    title, _, topology = name.removeprefix("tried: ").partition(" on ")
    if name.startswith("growth of chips"):
        title, topology = "2x7B expert, pair", name.split(": ")[1]
    elif name.startswith("growth of experts"):
        title, topology = f"forward, {name.split(': ')[1]} experts", "v5p:4x4x4"
    made = ", ".join(f"{key} {value}" for key, value in one["set"].items())
    if "error" in one:
        return f"| {title} | {topology} | {made} | not planned: {one['error']} |" + " |" * 8
    start = f"| {title} | {topology} | {made} | "
    end = f"{one['compile_seconds']:.0f} s |"
    if not one["fits"]:
        start += f"**does not fit**: {reason(one)} | "
    if not one["peak"]:
        return start + " | " * 7 + end
    if one["fits"]:
        start += f"{one['peak'] / 2**30:.1f} of {one['memory'] / 2**30:.0f} | "
    times = {name: one[f"{name}_seconds"] for name in ("compute", "hbm", "link")}
    one_after_the_other = max(times["compute"], times["hbm"]) + times["link"]
    days = f"{one['days']:.1f}" if one["steps"] else ""
    return (
        f"{start}{overhead(one):.2f} | {one['seconds']:.3g} | {max(times, key=times.__getitem__)} "
        f"| {one['mfu']:.0%} | {one['mfu'] * one['seconds'] / one_after_the_other:.0%} "
        f"| {one['tokens_per_second']:,.0f} | {days} | {end}"
    )


def overhead(one: dict[str, Any]) -> float:
    return one["compiled_flops"] / one["needed_flops"]


def reason(one: dict[str, Any]) -> str:
    """Of the compiler's sentence, what it would use of what there is."""
    said = re.search(r"([\d.]+)G\D*([\d.]+)G", one["because"])
    return f"{said[1]} of {said[2]}" if said else one["because"]


def pictures(found: dict[str, dict[str, Any]]) -> None:
    """Time and memory of a chip, one above the other, by chips and by experts."""
    for what, label in (("chips", "v5p chips"), ("experts", "experts, 2 of them active")):
        points = {
            one["chips"] if what == "chips" else int(name.split()[-1]): one
            for name, one in found.items()
            if name.startswith(f"growth of {what}") and one.get("peak")
        }
        if not points:
            continue
        figure = Figure(figsize=(5, 5), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        numbers, plans = list(points), list(points.values())
        for part, style in (("compute", "s--"), ("hbm", "^--"), ("link", "v--")):
            times = [one[f"{part}_seconds"] for one in plans]
            above.plot(numbers, times, style, label=NAMES[part], alpha=0.7)
        above.plot(numbers, [one["seconds"] for one in plans], "k-", label="roofline", zorder=0)
        if what == "chips":
            ideal = [plans[0]["seconds"] * numbers[0] / number for number in numbers]
            above.plot(numbers, ideal, ":", color="gray", label="as chips grow")
        above.set(xscale="log", yscale="log", ylabel="seconds a step")
        above.legend(fontsize=8)
        held = [one["arguments"] / 2**30 for one in plans]
        below.plot(numbers, [one["peak"] / 2**30 for one in plans], "ko-", label="peak")
        below.plot(numbers, held, "s--", color="gray", label="held from step to step")
        below.set(xlabel=label, ylabel="memory of a chip, GiB", ylim=(0, None))
        below.set_xticks(numbers, map(str, numbers))
        below.minorticks_off()
        below.legend(fontsize=8)
        for axes in (above, below):
            axes.grid(alpha=0.3)
        figure.savefig(HERE / f"scaling_{what}.png", dpi=110)


if __name__ == "__main__":
    main()
