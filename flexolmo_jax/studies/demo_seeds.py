"""The demo on several seeds: bits per byte of every model, and whether every promise holds.

    flexolmo study demo-seeds OUT

Demos that OUT already holds (OUT/seed0, ...) are not run again.
"""

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.studies.engine.commands import run_command
from flexolmo_jax.studies.engine.report import add_page_argument, machine, table, write_page

SEEDS = (0, 1, 2)
Report = dict[str, Any]  # report.json of a demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study demo-seeds`."""
    parser.add_argument("out", type=Path, help="folder of the demos")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    add_page_argument(parser, "demo.md")


def run(args: argparse.Namespace) -> None:
    """Runs the demos that are missing, and writes the page."""
    reports = []
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        if not (folder / "report.json").exists():
            run_command(["demo", "--out", str(folder), "--seed", str(seed)])
        reports.append(json.loads((folder / "report.json").read_text()))
    write_page(args.page, make_page(reports))


def make_page(reports: Sequence[Report]) -> list[str]:
    """The page, from the report of each seed."""
    domains = reports[0]["domains"]
    seconds = ", ".join(f"{report['seconds']:.0f}" for report in reports)
    rows = [
        [model, *(cell(reports, model, domain) for domain in domains)]
        for model in reports[0]["bits_per_byte"]
    ]
    verdicts = [
        [text, f"{value:+.1%}", "yes" if holds else "**no**"]
        for text, value, holds in promises(reports)
    ]
    return [
        f"# The demo on {len(reports)} seeds",
        "",
        f"`flexolmo study demo-seeds OUT`, {datetime.date.today()}, {machine()}, "
        f"Python {platform.python_version()}; {seconds} seconds.",
        "",
        "Bits per byte on held-out documents, mean of the seeds, and the change from the anchor "
        "(mean; smallest and largest of the seeds).",
        "",
        *table(["model", *domains], rows),
        "",
        "## What must hold on every seed",
        "",
        *table(["promise", "worst seed", ""], verdicts, "lrl"),
    ]


def cell(reports: Sequence[Report], model: str, domain: str) -> str:
    """The mean over seeds, and the change from the anchor: mean, smallest and largest."""
    mean = statistics.mean(report["bits_per_byte"][model][domain] for report in reports)
    if model == "anchor":
        return f"{mean:.3f}"
    changes = [change(report, model, domain) for report in reports]
    average = statistics.mean(changes)
    return f"{mean:.3f} ({average:+.1%}; {min(changes):+.1%} {max(changes):+.1%})"


def change(report: Report, model: str, domain: str, baseline: str = "anchor") -> float:
    """The relative change in bits per byte from a baseline."""
    scores = report["bits_per_byte"]
    return scores[model][domain] / scores[baseline][domain] - 1


def promises(reports: Sequence[Report]) -> list[tuple[str, float, bool]]:
    """Each promise of the demo, its value on the worst seed and domain, and whether it holds."""
    owners = reports[0]["domains"][1:]
    each = max(change(r, "merged", owner) for r in reports for owner in owners)
    mean = max(statistics.mean(change(r, "merged", owner) for owner in owners) for r in reports)
    public = max(change(r, "merged", "public") for r in reports)
    removed = min(change(r, f"merged_without:{owner}", owner) for r in reports for owner in owners)
    others = max(
        change(r, f"merged_without:{owner}", domain, baseline="merged")
        for r in reports
        for owner in owners
        for domain in r["domains"]
        if domain != owner
    )
    return [
        ("merged against the anchor, every owner's domain: -6% or better", each, each <= -0.06),
        ("merged against the anchor, their mean: -15% or better", mean, mean <= -0.15),
        ("public text: no worse", public, public <= 0),
        ("a domain switched off, against the anchor: -3% or worse", removed, removed >= -0.03),
        ("the other domains, against merged: not more than +2%", others, others <= 0.02),
    ]
