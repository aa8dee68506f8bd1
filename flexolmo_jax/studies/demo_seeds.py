"""Runs the demo on three seeds and writes docs/demo.md.

    .venv/bin/python flexolmo_jax/studies/demo_seeds.py OUT

Demos that are in OUT already (OUT/seed0, ...) are not run again.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
PAGE = Path(__file__).parent / "demo.md"


def main(out: Path) -> None:
    reports = []
    for seed in SEEDS:
        folder = out / f"seed{seed}"
        if not (folder / "report.json").exists():
            command = [sys.executable, "-m", "flexolmo_jax", "demo"]
            subprocess.run([*command, "--out", str(folder), "--seed", str(seed)], check=True)
        reports.append(json.loads((folder / "report.json").read_text()))
    PAGE.write_text("\n".join(page(reports)) + "\n")


def page(reports: list[dict]) -> list[str]:
    domains = reports[0]["domains"]
    owners = domains[1:]
    models = list(reports[0]["bits_per_byte"])
    seconds = ", ".join(f"{r['seconds']:.0f}" for r in reports)
    lines = [
        "# The demo on three seeds",
        "",
        f"`python flexolmo_jax/studies/demo_seeds.py OUT`, {datetime.date.today()}, {os.cpu_count()} cores "
        f"({platform.machine()}, {platform.system()}), Python {platform.python_version()}; "
        f"{seconds} seconds.",
        "",
        "Bits per byte on held-out documents, mean of the seeds, and the change from the anchor "
        "(mean; smallest and largest of the seeds).",
        "",
        "| model | " + " | ".join(domains) + " |",
        "| --- |" + " ---: |" * len(domains),
    ]
    for model in models:
        cells = []
        for domain in domains:
            values = [r["bits_per_byte"][model][domain] for r in reports]
            changes = [change(r, model, domain) for r in reports]
            cell = f"{statistics.mean(values):.3f}"
            if model != "anchor":
                cell += (
                    f" ({statistics.mean(changes):+.1%}; {min(changes):+.1%} {max(changes):+.1%})"
                )
            cells.append(cell)
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    lines += ["", "## What it must show, on every seed", "", "| promise | worst seed | |"]
    lines += ["| --- | ---: | --- |"]
    lines += [
        f"| {text} | {value:+.1%} | {'yes' if kept else '**no**'} |"
        for text, value, kept in promises(reports, owners)
    ]
    return lines


def change(report: dict, model: str, domain: str, than: str = "anchor") -> float:
    scores = report["bits_per_byte"]
    return scores[model][domain] / scores[than][domain] - 1


def promises(reports: list[dict], owners: list[str]) -> list[tuple[str, float, bool]]:
    """(promise, value of the worst seed and domain, whether it is kept)."""
    each = max(change(r, "merged", d) for r in reports for d in owners)
    mean = max(statistics.mean(change(r, "merged", d) for d in owners) for r in reports)
    public = max(change(r, "merged", "public") for r in reports)
    back = min(change(r, f"merged_without:{d}", d) for r in reports for d in owners)
    others = max(
        change(r, f"merged_without:{gone}", d, than="merged")
        for r in reports
        for gone in owners
        for d in r["domains"]
        if d != gone
    )
    return [
        ("merged against the anchor, every owner's domain: -1% or better", each, each <= -0.01),
        ("merged against the anchor, their mean: -5% or better", mean, mean <= -0.05),
        ("public text: not more than +2%", public, public <= 0.02),
        ("a domain switched off, against the anchor: -3% or worse", back, back >= -0.03),
        ("the other domains, against merged: not more than +2%", others, others <= 0.02),
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
