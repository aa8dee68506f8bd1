"""The demo: from text to a merged model on the corpus that comes with the project, in minutes.

An anchor is trained on public text. Each owner's expert is then trained in a process of its own,
which reads only that owner's text and the anchor. The experts are merged and measured, and each is
switched off one by one. At the end the words of an answer are looked for in the training texts.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexolmo_jax.config import DataConfig, ExpertTraining, load_config
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents, score
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.runtime.console import coloured, console, show_table, tell
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.storage.outputs import check_kept_folder
from flexolmo_jax.studies.demo_trace import trace_demo
from flexolmo_jax.studies.engine.commands import run_command
from flexolmo_jax.studies.engine.plots import heat_map

OWNERS = ("code", "math", "educational", "creative")
TRACED = "educational"  # whose prompt is answered and traced, with its expert on and off
PARALLEL = 2  # owners that train at the same time


def run_demo(out: Path, seed: int = 0) -> dict[str, Any]:
    """Runs the demo, and writes OUT/anchor, OUT/experts, OUT/merged, OUT/indexes, and a report.

    Args:
      out: a new folder.
      seed: of initialisation and data order, in all stages.

    Returns:
      the report: seconds, domains, bits_per_byte[MODEL][DOMAIN], trace, seeds and configs; it is
      in OUT/report.json, too, beside report.png and trace.html.

    Raises:
      ValueError: `out` already exists.
      RuntimeError: a training failed.
    """
    check_kept_folder(out, holding=())
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    anchor, merged = out / "anchor", out / "merged"
    packages = {name: out / "experts" / name for name in OWNERS}

    def train(stage: str, config: str, text: str, package: Path, *more: str) -> None:
        words = ["train", stage, config, "--data", f"corpus:{text}", "--seed", str(seed), *more]
        words += ["--out", str(package), "--run", str(out / "runs" / package.name)]
        # The owners' programs are the same: one compiles them, and the others read them.
        run_command(words, compiled=out / "runs" / "compiled", quiet=stage == "expert")

    def train_owner(name: str) -> None:
        owner = ("--name", name, "--anchor", str(anchor))
        train("expert", "demo_expert", name, packages[name], *owner)
        tell(f"expert {name}: trained and packaged")

    console.rule("1. the public anchor")
    train("anchor", "demo_anchor", "public", anchor)
    console.rule("2. each owner's expert, from its own text and the anchor")
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(train_owner, OWNERS))
    console.rule("3. merge, measure, switch off")
    merge(anchor, list(packages.values()), merged)
    report: dict[str, Any] = {
        "domains": ["public", *OWNERS],
        "bits_per_byte": _measure(anchor, packages, merged),
        "samples": _samples(load(merged)),
        "seeds": {"anchor": seed, **{name: seed for name in OWNERS}},
        "configs": {
            "anchor": _saved_config(out / "runs" / "anchor"),
            **{name: _saved_config(out / "runs" / name) for name in OWNERS},
        },
    }
    heat_map(report["bits_per_byte"], out / "report.png", baseline="anchor")
    _show(report)
    console.rule("4. where the words of an answer stand")
    data = load_config("demo_expert", ExpertTraining).data
    names = ["public", *OWNERS]
    prompt = _prompts(data)[TRACED]
    report["trace"] = trace_demo(load(merged), TRACED, prompt, names, data, out)
    report["seconds"] = round(time.monotonic() - started, 1)
    replace_file(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    tell(f"{report['seconds']:.0f} seconds; report.json, report.png and trace.html are in {out}")
    return report


def _measure(anchor: Path, packages: dict[str, Path], merged: Path) -> dict[str, dict[str, float]]:
    """Returns bits_per_byte[MODEL][DOMAIN] on the held-out documents of every domain."""
    data = load_config("demo_expert", ExpertTraining).data
    texts = {name: heldout_documents(f"corpus:{name}", data) for name in ("public", *packages)}

    def row(model: FlexOlmo, without: tuple[str, ...] = ()) -> dict[str, float]:
        return {
            domain: score(model, documents, without=without).bits_per_byte
            for domain, documents in texts.items()
        }

    table = {"anchor": row(load(anchor))}
    for name, package in packages.items():
        table[f"expert:{name}"] = row(load(package, anchor=anchor))
    model = load(merged)
    table["merged"] = row(model)
    for name in packages:
        table[f"merged_without:{name}"] = row(model, (name,))
    return table


def _samples(model: FlexOlmo) -> dict[str, str]:
    """How the model continues the first words of a held-out document of each domain."""
    prompts = _prompts(load_config("demo_expert", ExpertTraining).data)
    texts = model.generate(list(prompts.values()), 48, temperature=0.7, top_p=0.9)
    return {
        name: f"{prompt} || {text}"
        for (name, prompt), text in zip(prompts.items(), texts, strict=True)
    }


def _prompts(data: DataConfig) -> dict[str, str]:
    return {
        name: heldout_documents(f"corpus:{name}", data)[0].text.strip()[:60]
        for name in ("public", *OWNERS)
    }


def _saved_config(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def _show(report: dict[str, Any]) -> None:
    scores, domains = report["bits_per_byte"], report["domains"]
    rows = []
    for model, row in scores.items():
        cells = {}
        for domain in domains:
            change = row[domain] / scores["anchor"][domain] - 1
            colour = "green" if change < -0.01 else "red" if change > 0.02 else "white"
            cells[domain] = coloured(f"{row[domain]:.3f} ", (f"{change:+.1%}", colour))
        rows.append({"model": model, **cells})
    show_table(rows, title="bits per byte on held-out documents (lower is better)")
    for domain, sample in report["samples"].items():
        tell(f"{domain}: {sample!r}")
