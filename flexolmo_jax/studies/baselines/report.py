"""The report of a study: report.md, report.json and figures."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.studies.baselines import plots
from flexolmo_jax.studies.baselines.costs import costs_as_json
from flexolmo_jax.studies.baselines.rates import ChosenRates
from flexolmo_jax.studies.baselines.report_page import make_page
from flexolmo_jax.studies.baselines.results import AFTER, Results
from flexolmo_jax.studies.baselines.scores import load_scores
from flexolmo_jax.studies.baselines.seed_stages import SeedPlan
from flexolmo_jax.studies.baselines.shared_stages import SCORES, Shared
from flexolmo_jax.studies.baselines.tables import FORMS, growth, removal, titles, top_k
from flexolmo_jax.studies.baselines.targets import kept_methods, make_targets
from flexolmo_jax.studies.engine.plots import change_map, heat_map
from flexolmo_jax.studies.engine.report import machine, write_json
from flexolmo_jax.studies.engine.stages import Stage


def write_report(
    rates: ChosenRates, shared: Shared, plans: Mapping[int, SeedPlan], out: Path
) -> None:
    """Writes report.md, report.json and the figures of all seeds that are done.

    Args:
      rates, shared: the study, with its chosen rates.
      plans: of the seeds; all their stages are done.
      out: the study's folder.
    """
    config = rates.config
    results = Results(config, shared, plans)
    routing = _mean_routing(plans)
    counted = {stage.folder for plan in plans.values() for stage in plan.stages}
    tried = {s.folder: s for s in rates.stages if s.folder not in counted}
    for stage in shared.stages:
        tried.pop(stage.folder, None)
    report = {
        "config": json.loads(json.dumps(dataclasses.asdict(config)))
        | {"texts": Path(config.texts).name},  # without the private path
        "seeds": list(plans),
        "machine": machine(),
        "minutes": {seed: _minutes(plan.stages) for seed, plan in plans.items()},
        "minutes_shared": _minutes(shared.stages),
        "minutes_rates": _minutes(tried.values()),
        "sequences": {
            name: {"sequences": len(one.tokens), "documents": int(one.document.max() + 1)}
            for name, one in results.sequences.items()
        },
        "rates": rates.choices,
        "choices": results.choices,
        "costs": costs_as_json(config, results.choices),
        "bits_per_byte": {
            name: {
                c: results.value(name, c).json() for c in results.columns if results.has(name, c)
            }
            for name in results.methods
        },
        "routing": {
            name: {domain: shares.round(4).tolist() for domain, shares in of_family.items()}
            for name, of_family in routing.items()
        },
        "kept": {
            name: {owner: results.kept(name, owner) for owner in config.owners}
            for name in kept_methods(config)
        },
        "targets": make_targets(results),
    }
    write_json(out / "report.json", report)
    _draw(results, routing, out)
    replace_file(out / "report.md", "\n".join(make_page(results, report)) + "\n")


def _mean_routing(plans: Mapping[int, SeedPlan]) -> dict[str, dict[str, np.ndarray]]:
    """The mean over seeds, by family and domain."""
    names = next(iter(plans.values())).routing
    of_seeds = {
        name: [load_scores(plan.routing[name].folder / SCORES) for plan in plans.values()]
        for name in names
    }
    return {
        name: {domain: np.mean([one[domain] for one in seeds], axis=0) for domain in seeds[0]}
        for name, seeds in of_seeds.items()
    }


def _minutes(stages: Iterable[Stage]) -> dict[str, float]:
    """Minutes by kind of stage: the part of its name before the domain."""
    by_kind: dict[str, float] = {}
    for stage in stages:
        parts = stage.name.split("/")
        kind = parts[1] if parts[0].startswith("seed") else parts[0]
        by_kind[kind] = by_kind.get(kind, 0.0) + stage.seconds / 60
    return {kind: round(minutes, 2) for kind, minutes in by_kind.items()}


def _draw(results: Results, routing: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> None:
    config = results.config
    columns = [c for c in results.columns if c != AFTER]
    shown = {
        title: {c: results.value(name, c).mean for c in columns}
        for name, title in titles(config).items()
        if all(results.has(name, c) for c in columns)
    }
    heat_map(shown, out / "methods.png", baseline="public anchor")
    for form in FORMS if config.has_heads else FORMS[:1]:
        change_map(
            [f"without {name}" for name in config.owners], columns,
            removal(results, columns, form), out / form.removal_figure,
            label="change in bits per byte",
            title="Each expert switched off: change from all experts",
        )  # fmt: skip
    plots.routing_map(
        routing["flexolmo"], config.domains, out / "routing.png",
        title="Mean weight of each expert, in %",
    )  # fmt: skip
    if config.has_heads:
        plots.routing_map(
            routing["evidence"], config.domains, out / "routing_evidence.png",
            title="Mean weight of each expert in evidence routing, in %",
        )  # fmt: skip
    level = {
        "public anchor": results.owners_mean("anchor").mean,
        "oracle: own anchor + expert": results.owners_mean("oracle").mean,
    }
    ticks, lines = top_k(results)
    plots.curves(
        ticks, lines, out / "top_k.png", title="Mean over the owners' domains", level=level,
        labels=("experts a token may use", "bits per byte (lower is better)"),
    )  # fmt: skip
    counts, names = growth(config, FORMS[-1] if config.has_heads else FORMS[0])
    plots.curves(
        counts,
        {domain: [_change(results, name, domain) for name in names] for domain in config.domains},
        out / "owners.png", title="Experts added one by one, in the order of the legend",
        labels=("owners in the merged model", "change in bits per byte from the anchor"),
        level={"no change": 0.0}, shares=True,
    )  # fmt: skip


def _change(results: Results, method: str, column: str) -> tuple[float, float]:
    """The relative change from the anchor, and its standard deviation over seeds."""
    start = results.value("anchor", column).mean
    value = results.value(method, column, minus="anchor")
    return value.mean / start, value.spread / start
