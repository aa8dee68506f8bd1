"""Plans of the full-size stages on TPU slices, and how they grow with chips and experts.

    pip install -e '.[plan]'
    flexolmo study scaling [--only WORD ...] [--check]

No TPU is needed: everything is compiled ahead of time, about a minute each. Plans that scaling.json
already holds are kept unless --only names them. With --check, those in CHECKED are made again with
the JAX that runs this and are shown beside the recorded ones: do those still hold?
"""

import argparse
import concurrent.futures.process
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import Training, load_config
from flexolmo_jax.planning.chips import chip_of
from flexolmo_jax.planning.plan import make_plan, model_of
from flexolmo_jax.studies.engine.report import (
    add_page_argument,
    add_results_argument,
    write_json,
    write_page,
)
from flexolmo_jax.studies.scaling_page import Plans, draw_growth, make_page

CHECKED = ("growth of chips: v5p:2x4x4", "8x7B forward on v5e:16x16", "8x7B decode on v5e:16x16")
SLICES = ("v5p:4x4x4", "v5p:4x8x8", "v5e:16x16", "v6e:8x8")
SEQUENCES = 1024  # of a step: 4M tokens
DECODED = 256  # sequences that get one more token in a step of decoding
STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {  # by title: config, stage, changed values
    "7B anchor": ("olmo2_7b_anchor", "anchor", {}),
    "2x7B expert, pair": ("flexolmo_2x7b_expert", "expert", {}),
    "2x7B expert, alone": ("flexolmo_2x7b_expert", "expert", {"gating": "fixed"}),
    "7x7B router": ("flexolmo_7x7b_router", "router", {}),
    "8x7B forward": ("flexolmo_8x7b_router", "forward", {"expert_compute": "grouped"}),
    "8x7B decode": ("flexolmo_8x7b_router", "decode", {"expert_parallel": 8}),
}
# The settings that fit and recompute least: microbatches of a chip, and what is rematerialized.
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
# What would recompute less, but does not fit.
TRIED: list[tuple[str, str, dict[str, Any]]] = [
    ("2x7B expert, pair", "v5e:16x16", {"microbatches": 4, "remat": "matmuls"}),
    ("7x7B router", "v5e:16x16", {"microbatches": 4, "remat": "matmuls"}),
    ("7x7B router", "v6e:8x8", {"microbatches": 16, "remat": "matmuls"}),
]
GROWTH_CHIPS = ("v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8")
GROWTH_EXPERTS = (2, 4, 8, 16, 32, 64)


class Job(NamedTuple):
    """A plan to make.

    Attributes:
      config: a preset.
      stage: as `make_plan` takes it.
      topology: of the slice.
      values: of the config, changed.
      model: values of the config's model, changed.
    """

    config: str
    stage: str
    topology: str
    values: Mapping[str, Any]
    model: Mapping[str, Any]


def jobs() -> dict[str, Job]:
    """All plans by name."""
    named: dict[str, Job] = {}
    for title, (config, stage, values) in STAGES.items():
        for topology in SLICES:
            chosen = values | SETTINGS.get((title, topology), {})
            named[f"{title} on {topology}"] = Job(config, stage, topology, chosen, {})
    for title, topology, chosen in TRIED:
        config, stage, values = STAGES[title]
        named[f"tried: {title} on {topology}"] = Job(config, stage, topology, values | chosen, {})
    for topology in GROWTH_CHIPS:  # each chip works on two sequences at a time, on any slice
        chosen = {"microbatches": SEQUENCES // 2 // chip_of(topology)[1], "remat": "matmuls"}
        name = f"growth of chips: {topology}"
        named[name] = Job("flexolmo_2x7b_expert", "expert", topology, chosen, {})
    for count in GROWTH_EXPERTS:
        model = {"num_experts": count, "active_experts": 2}
        grouped = {"expert_compute": "grouped"}
        named[f"growth of experts: {count}"] = Job(
            "flexolmo_8x7b_router", "forward", "v5p:4x4x4", grouped, model
        )
    return named


def make(job: Job) -> dict[str, Any]:
    """One plan, or the error that there is none."""
    config = load_config(job.config, Training)
    sequences = DECODED if job.stage == "decode" else SEQUENCES
    data = dataclasses.replace(config.data, batch_size=sequences)
    steps = round(config.steps * config.data.batch_size / sequences)
    config = dataclasses.replace(config, data=data, steps=steps, **job.values)
    model = dataclasses.replace(model_of(job.config, config), **job.model)
    try:
        return make_plan(config, model, job.stage, job.topology).values()
    except Exception as error:  # the compiler's own kinds: the table says what it said
        return {"error": str(error).splitlines()[0][:300]}


def make_in_a_process(job: Job) -> dict[str, Any]:
    """One plan, in a process of its own: the compiler never frees its memory, and may crash."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            plan = pool.submit(make, job).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            plan = {"error": str(error)}
    return {"date": str(datetime.date.today()), "set": dict(job.values), **plan}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study scaling`."""
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="plans whose name has one of these words"
    )
    parser.add_argument(
        "--check", action="store_true", help="make those in CHECKED again, with this JAX"
    )
    add_page_argument(parser, "scaling.md")
    add_results_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Makes the plans that are missing or asked for, and writes the page and the figures."""
    record, checks_file = args.results / "scaling.json", args.results / "scaling_checks.json"
    recorded, checks = _read(record), _read(checks_file)
    named = jobs()
    plans = {name: recorded[name] for name in named if name in recorded}
    if args.check:
        version = importlib.metadata.version("jax")
        for name in _announced(CHECKED):
            checks.setdefault(name, {})[version] = make_in_a_process(named[name])
            write_json(checks_file, dict(sorted(checks.items())))
    else:
        for name in _announced(_chosen(named, plans, args.only)):
            plan = make_in_a_process(named[name])
            plans |= {same: plan for same in named if named[same] == named[name]}
            plans = {name: plans[name] for name in named if name in plans}
            write_json(record, plans)
        draw_growth(plans, args.results)
    write_page(args.page, make_page(plans, checks, args.results, args.page))


def _chosen(named: Mapping[str, Job], plans: Plans, words: list[str] | None) -> list[str]:
    """Names of the plans to make, of equal jobs the first one only."""
    names = [
        name for name in named
        if (any(word in name for word in words) if words else name not in plans)
    ]  # fmt: skip
    return [name for n, name in enumerate(names) if all(named[o] != named[name] for o in names[:n])]


def _announced(names: Sequence[str]) -> Iterator[str]:
    """The names, each printed before it is worked on."""
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
        yield name


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}
