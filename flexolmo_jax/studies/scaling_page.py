"""The page and the figures of the scaling study, from the plans that it recorded."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexolmo_jax.studies.engine.report import link, machine, table

Plan = Mapping[str, Any]  # `Plan.values()`, with "date" and "set"; or "error" in place of values
Plans = Mapping[str, Plan]  # by name
GIB = 2**30
RESOURCES = {"compute": "compute", "hbm": "memory (HBM)", "link": "ICI"}
HEAD = [
    "stage", "slice", "set", "peak of memory, GiB", "overhead", "roofline, s", "bound by", "MFU",
    "MFU, ICI serialized", "tokens/s", "days", "compiled in",
]  # fmt: skip
ALIGN = "llllrrlrrrrr"
CHECK_HEAD = [
    "plan", "JAX", "compiled FLOPs, T", "bytes of HBM, GB", "bytes received, GB", "roofline, s",
    "peak of memory, GiB",
]  # fmt: skip
INTRODUCTION = """\
# Full size on TPU slices, compiled ahead of time

`flexolmo study scaling`, on {machine} without a TPU, {dates}. libtpu compiles the real step of each
stage for the slice; **nothing here has run**, so no time here was measured except that of
compiling. Memory is the compiler's own account. FLOPs, bytes and collectives are read from the
compiled program, its loops counted as often as they run (`flexolmo_jax/planning`).
"""
EXPLANATION = """\
- *set*: `microbatches` is the number of parts into which a chip divides its share of the batch;
  `remat` is the rematerialization policy, what the backward pass computes again: all but matmul
  outputs; `wide_matmuls`: also the FFN-wide matmuls; whole layers.
- *overhead*: compiled FLOPs (matmuls and attention) over needed ones, as in
  `flexolmo_jax/modeling/flops.py`: nothing computed twice, no gradient of a frozen weight, no
  masked score.
- *roofline*: the longest of the times that compute, HBM and ICI need at their published peak
  rates (`planning/chips.py`), as if the others were hidden behind it. *MFU* is needed FLOPs at that
  time: an upper bound. *MFU, ICI serialized* is the same if no transfer is hidden.
- *days*: the whole stage, with the number of tokens that its config in `configs/` sets.
- *bound by* HBM: its bytes are those of every operand and result, as if nothing that one operation
  leaves stayed on the chip for the next.
"""
CHECKS = """\
## Other versions of JAX

The plans above were made with JAX 0.10.2 and libtpu 0.0.52, by a reading of XLA's text that missed
transfers which the compiler spreads over several fusions, as it may on v5e. Some of them again
(`flexolmo study scaling --check`), as they are read now, from XLA's protobuf:
"""


class Target(NamedTuple):
    """What a plan should reach.

    Attributes:
      words: the target.
      concerns: whether it is a target of this plan.
      shown: the plan's value, in words.
      is_met: whether the plan reaches it.
    """

    words: str
    concerns: Callable[[Plan], bool]
    shown: Callable[[Plan], str]
    is_met: Callable[[Plan], bool]


def overhead(plan: Plan) -> float:
    """Compiled FLOPs as a multiple of the needed ones."""
    return plan["compiled_flops"] / plan["needed_flops"]


def reason(plan: Plan) -> str:
    """Why a plan does not fit: the needed and the available memory, from the compiler's message."""
    sizes = re.search(r"([\d.]+)G\D*([\d.]+)G", plan["because"])
    return f"{sizes[1]} of {sizes[2]}" if sizes else plan["because"]


TARGETS = (
    Target(
        "compile in at most 150 s on 2 cores", lambda plan: True,
        lambda plan: f"{plan['compile_seconds']:.0f} s",
        lambda plan: plan["compile_seconds"] <= 150,
    ),
    Target("fit in the chip's memory, GiB", lambda plan: True, reason, lambda plan: plan["fits"]),
    Target(
        "training, forward: compiled FLOPs at most 1.35x the needed",
        lambda plan: bool(plan["peak"]) and plan["stage"] != "decode",
        lambda plan: f"{overhead(plan):.2f}x", lambda plan: overhead(plan) <= 1.35,
    ),
    Target(
        "training: MFU at the roofline at least 55%",
        lambda plan: bool(plan["peak"] and plan["steps"]), lambda plan: f"{plan['mfu']:.0%}",
        lambda plan: plan["mfu"] >= 0.55,
    ),
)  # fmt: skip


def make_page(
    plans: Plans, checks: Mapping[str, Plans], results: Path, page: Path | None
) -> list[str]:
    """The page.

    Args:
      plans: by name.
      checks: plans that were made again, by name and version of JAX.
      results: the folder of the figures.
      page: where the page goes.
    """
    stages = {name: plan for name, plan in plans.items() if ":" not in name.split(" on ")[0]}
    dates = sorted({plan["date"] for plan in plans.values()})
    introduction = INTRODUCTION.format(
        machine=machine(), dates=" to ".join(dict.fromkeys((dates[0], dates[-1])))
    )
    targets = [target_row(target, stages) for target in TARGETS]
    return [
        *introduction.splitlines(),
        "",
        "## Targets",
        "",
        *table([f"of the {len(stages)} plans below", "met", "missed"], targets, "lrl"),
        "",
        "## Stages",
        "",
        "A training step and a forward pass are of 4M tokens, in sequences of 4096; decoding is "
        "one more token of 256 sequences that have 4096 each.",
        "",
        *plans_table(stages),
        "",
        *EXPLANATION.splitlines(),
        "",
        "What would recompute less, but does not fit:",
        "",
        *plans_table(_named(plans, "tried")),
        "",
        *CHECKS.splitlines(),
        "",
        *checks_part(plans, checks),
        "",
        *growth_part(plans, results, page),
    ]


def _named(plans: Plans, start: str) -> Plans:
    return {name: plan for name, plan in plans.items() if name.startswith(start)}


def plans_table(plans: Plans) -> list[str]:
    """The table of some plans."""
    return table(HEAD, [row(name, plan) for name, plan in plans.items()], ALIGN)


def row(name: str, plan: Plan) -> list[str]:
    """A row of `plans_table`."""
    title, _, topology = name.removeprefix("tried: ").partition(" on ")
    if name.startswith("growth of chips"):
        title, topology = "2x7B expert, pair", name.split(": ")[1]
    elif name.startswith("growth of experts"):
        title, topology = f"forward, {name.split(': ')[1]} experts", "v5p:4x4x4"
    values = ", ".join(f"{key} {value}" for key, value in plan["set"].items())
    start = [title, topology, values]
    if "error" in plan:
        return [*start, f"not planned: {plan['error']}", *[""] * 8]
    memory = f"{plan['peak'] / GIB:.1f} of {plan['memory'] / GIB:.0f}" if plan["peak"] else ""
    if not plan["fits"]:
        memory = f"**does not fit**: {reason(plan)}"
    compiled = f"{plan['compile_seconds']:.0f} s"
    if not plan["peak"]:
        return [*start, memory, *[""] * 7, compiled]
    times = {name: plan[f"{name}_seconds"] for name in RESOURCES}
    serialized = max(times["compute"], times["hbm"]) + times["link"]
    return [
        *start, memory, f"{overhead(plan):.2f}", f"{plan['seconds']:.3g}",
        max(times, key=times.__getitem__), f"{plan['mfu']:.0%}",
        f"{plan['mfu'] * plan['seconds'] / serialized:.0%}",
        f"{plan['tokens_per_second']:,.0f}", f"{plan['days']:.1f}" if plan["steps"] else "",
        compiled,
    ]  # fmt: skip


def target_row(target: Target, plans: Plans) -> list[str]:
    """How many plans meet a target, and which do not."""
    asked = {n: plan for n, plan in plans.items() if "error" not in plan and target.concerns(plan)}
    missed = [f"{n} ({target.shown(plan)})" for n, plan in asked.items() if not target.is_met(plan)]
    missed += [f"{name} (not planned)" for name, plan in plans.items() if "error" in plan]
    met = sum(map(target.is_met, asked.values()))
    return [target.words, f"{met} of {len(asked)}", "; ".join(missed) or "none"]


def checks_part(plans: Plans, checks: Mapping[str, Plans]) -> list[str]:
    """The table of plans that were made again, and how far they are from the recorded ones."""
    rows, bytes_apart, link_apart = [], [0.0], [0.0]
    for name, versions in checks.items():
        recorded = plans[name]
        for version, plan in {"above": recorded, **versions}.items():
            received = sum(plan["collectives"].values()) / 1e9
            rows.append(
                [
                    name, version, f"{plan['compiled_flops'] / 1e12:,.3f}",
                    f"{plan['hbm_bytes'] / 1e9:,.2f}", f"{received:,.2f}",
                    f"{plan['seconds']:.3g}", f"{plan['peak'] / GIB:.2f}",
                ]
            )  # fmt: skip
            bytes_apart.append(abs(plan["hbm_bytes"] / recorded["hbm_bytes"] - 1))
            link_apart.append(plan["link_seconds"] / recorded["link_seconds"] - 1)
    largest = max(link_apart)
    received_words = (
        f"Of these, the plan that changes most receives {largest:.0%} more than is stated above."
        if largest > 0.005 else "What is received is as above."
    )  # fmt: skip
    sentence = f"Bytes of HBM differ by {max(bytes_apart):.1%} at most from those above."
    return [*table(CHECK_HEAD, rows, "llr"), "", f"{sentence} {received_words}"]


def growth_part(plans: Plans, results: Path, page: Path | None) -> list[str]:
    """How time and memory grow with chips and with experts."""
    figures = (f"![{what}]({link(results / f'scaling_{what}.png', page)})" for what in LABELS)
    return [
        "## Growth",
        "",
        " ".join(figures),
        "",
        "Left: the 2x7B expert step of 4M tokens; each chip works on two sequences at a time. "
        + growth_words(plans, "chips"),
        "",
        "Right: a forward pass of 4M tokens, two experts of each token active, on 64 chips; what "
        "all chips hold grows with the experts, and so does what each receives to gather a layer. "
        + growth_words(plans, "experts"),
        "",
        *plans_table(_named(plans, "growth")),
    ]


def growth_points(plans: Plans, what: str) -> dict[int, Plan]:
    """The plans of a growth, by the number of chips or experts."""
    return {
        plan["chips"] if what == "chips" else int(name.split()[-1]): plan
        for name, plan in _named(plans, f"growth of {what}").items()
        if plan.get("peak")
    }


def growth_words(plans: Plans, what: str) -> str:
    """From the first to the last plan of a growth: time and memory, in words."""
    points = growth_points(plans, what)
    if len(points) < 2:
        return ""
    (first, few), (last, many) = list(points.items())[0], list(points.items())[-1]
    return (
        f"From {first} to {last} {what}: {few['seconds']:.3g} to {many['seconds']:.3g} s, "
        f"peak {few['peak'] / GIB:.1f} to {many['peak'] / GIB:.1f} GiB."
    )


LABELS = {"chips": "v5p chips", "experts": "experts, 2 of them active"}


def draw_growth(plans: Plans, folder: Path) -> None:
    """Writes FOLDER/scaling_chips.png and scaling_experts.png: time above, memory below."""
    for what, label in LABELS.items():
        points = growth_points(plans, what)
        if not points:
            continue
        figure = Figure(figsize=(5, 5), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        _draw_time(above, points, what == "chips")
        _draw_memory(below, points, label)
        for axes in (above, below):
            axes.grid(alpha=0.3)
        figure.savefig(folder / f"scaling_{what}.png", dpi=110)


def _draw_time(axes: Axes, points: Mapping[int, Plan], has_ideal: bool) -> None:
    numbers, plans = list(points), list(points.values())
    for resource, style in zip(RESOURCES, ("s--", "^--", "v--"), strict=True):
        times = [plan[f"{resource}_seconds"] for plan in plans]
        axes.plot(numbers, times, style, label=RESOURCES[resource], alpha=0.7)
    axes.plot(numbers, [plan["seconds"] for plan in plans], "k-", label="roofline", zorder=0)
    if has_ideal:
        ideal = [plans[0]["seconds"] * numbers[0] / number for number in numbers]
        axes.plot(numbers, ideal, ":", color="gray", label="linear speedup")
    axes.set(xscale="log", yscale="log", ylabel="seconds a step")
    axes.legend(fontsize=8)


def _draw_memory(axes: Axes, points: Mapping[int, Plan], label: str) -> None:
    numbers, plans = list(points), list(points.values())
    held = [plan["arguments"] / GIB for plan in plans]
    axes.plot(numbers, [plan["peak"] / GIB for plan in plans], "ko-", label="peak")
    axes.plot(numbers, held, "s--", color="gray", label="held from step to step")
    axes.set(xlabel=label, ylabel="memory of a chip, GiB", ylim=(0, None))
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.legend(fontsize=8)
