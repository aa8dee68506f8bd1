"""The report of a study: report.md, report.json and pictures."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.evaluation.plots import heat_map
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.studies.baselines import plots
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.datasets import MIXED
from flexolmo_jax.studies.baselines.results import AFTER, Results, Value
from flexolmo_jax.studies.baselines.scores import load_scores
from flexolmo_jax.studies.baselines.seed_stages import SeedPlan
from flexolmo_jax.studies.baselines.shared_stages import SCORES, Shared
from flexolmo_jax.studies.engine.stages import Stage

# Bits per byte: half of the gap to a decayed BTM that an exploratory study of five owners saw, with
# experts and dense models trained as here (2.225 against 2.029; after a change 2.484, 2.253).
HALF_OF_GAP = {"owners": 0.098, AFTER: 0.115}


def titles(config: StudyConfig) -> dict[str, str]:
    """Of the methods that stand in the first table, in its order."""
    kinds = {"logistic": "logistic rows", "lda": "LDA rows"}
    return {
        "anchor": "public anchor",
        **{f"dense.{name}": f"dense, fine-tuned on {name}" for name in config.owners},
        **{f"expert.{name}": f"anchor + expert {name}" for name in config.owners},
        "soup_uniform": "soup, uniform",
        "soup_weighted": "soup, weighted",
        "prompt_routing": "prompt routing (classifier)",
        **{
            f"btm_{kind}_top{k}": f"BTM top-{k}, {title}"
            for kind, title in (
                ("prefix", f"{config.prefix}-token prefix"),
                ("running", "running posterior"),
                ("decay", "decayed posterior"),
            )
            for k in (1, 2)
        },
        "btx_uniform": "BTX, uniform router",
        **{f"btx_{router}": f"BTX, {kinds[router]}" for router in config.routers},
        "btx_best": "BTX, routed as chosen for it",
        "paper_topall": "FlexOlmo, paper's form",
        "paper_tuned": "FlexOlmo, paper's form + router tuning",
        **{f"flexolmo_{router}": f"FlexOlmo, {kinds[router]}" for router in config.routers},
        "flexolmo": "FlexOlmo, routed as chosen",
        "flexolmo_tuned": "FlexOlmo, routed as chosen + router tuning",
        **{
            f"unrestricted_{times:g}x": f"unrestricted MoE, {times:g}x FLOPs"
            for times in config.unrestricted_flops
        },
        "oracle": "oracle: each domain's own anchor + expert",
    }


def ablation_titles() -> dict[str, str]:
    """Of the forms of FlexOlmo that lack something."""
    return {
        "flexolmo": "FlexOlmo, routed as chosen",
        "flexolmo_without_bias": "- router bias",
        "flexolmo_bias_folded": "- router bias, which is folded into the rows",
        "flexolmo_uncoordinated": "- coordination (experts are the dense models' networks)",
        "paper_topall": "FlexOlmo, paper's form",
        "paper_without_bias": "- router bias",
        "paper_plain": "- domain embedding as the first row",
    }


def write_report(
    config: StudyConfig, shared: Shared, plans: Mapping[int, SeedPlan], out: Path
) -> None:
    """Writes report.md, report.json and the pictures of all seeds that are done.

    Args:
      config, shared: the study.
      plans: of the seeds; all their stages are done.
      out: the study's folder.
    """
    results = Results(config, shared, plans)
    routing = _mean_routing(plans)
    report = {
        "config": json.loads(json.dumps(dataclasses.asdict(config)))
        | {"texts": Path(config.texts).name},  # whose folder is nobody's business
        "seeds": list(plans),
        "machine": _machine(),
        "minutes": {seed: _minutes(plan.stages) for seed, plan in plans.items()},
        "minutes_shared": _minutes(shared.stages),
        "sequences": {
            name: {"sequences": len(one.tokens), "documents": int(one.document.max() + 1)}
            for name, one in results.sequences.items()
        },
        "choices": results.choices,
        "bits_per_byte": {
            name: {
                c: results.value(name, c).json() for c in results.columns if results.has(name, c)
            }
            for name in results.methods
        },
        "routing": {domain: shares.round(4).tolist() for domain, shares in routing.items()},
        "kept": {
            name: {owner: results.kept(name, owner) for owner in config.owners}
            for name in _kept_methods(config)
        },
        "targets": _targets(results),
    }
    replace_file(out / "report.json", json.dumps(report, indent=1) + "\n")
    _pictures(results, routing, out)
    replace_file(out / "report.md", "\n".join(_page(results, report)) + "\n")


def _mean_routing(plans: Mapping[int, SeedPlan]) -> dict[str, np.ndarray]:
    found = [load_scores(plan.routing.folder / SCORES) for plan in plans.values()]
    return {domain: np.mean([one[domain] for one in found], axis=0) for domain in found[0]}


def _machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}, {platform.system()})"


def _minutes(stages: Sequence[Stage]) -> dict[str, float]:
    """By kind of stage: the part of its name before the domain."""
    out: dict[str, float] = {}
    for stage in stages:
        parts = stage.name.split("/")
        kind = parts[1] if parts[0].startswith("seed") else parts[0]
        out[kind] = out.get(kind, 0.0) + stage.seconds / 60
    return {kind: round(minutes, 2) for kind, minutes in out.items()}


def _kept_methods(config: StudyConfig) -> list[str]:
    rows = [f"flexolmo_{router}" for router in config.routers]
    return ["paper_topall", "paper_tuned", *rows, "flexolmo", "flexolmo_tuned", "btx_best"]


def _targets(results: Results) -> list[dict[str, Any]]:
    """What the merged model should reach, and whether it does."""
    config, owners = results.config, results.config.owners
    router = results.choices[min(results.choices)]["flexolmo"]["router"]
    wanted = [
        ("better than the public anchor", "anchor", owners, 0.0),
        ("better than the uniform soup", "soup_uniform", owners, 0.0),
        ("better than the weighted soup", "soup_weighted", owners, 0.0),
        ("better than prompt routing", "prompt_routing", owners, 0.0),
        ("better than BTX with the same rows", f"btx_{router}", owners, 0.0),
        ("better than BTX at its best", "btx_best", owners, 0.0),
    ]
    if 1.0 in config.unrestricted_flops:
        wanted.append(("at least equal to unrestricted, 1x", "unrestricted_1x", owners, 0.0))
    wanted += [
        ("mixed: better than BTM top-2, prefix", "btm_prefix_top2", (MIXED,), 0.0),
        ("mixed: better than BTM top-2, running", "btm_running_top2", (MIXED,), 0.0),
        ("gap to BTM top-2, decayed", "btm_decay_top2", owners, HALF_OF_GAP["owners"]),
        ("after the change: gap to the same", "btm_decay_top2", (AFTER,), HALF_OF_GAP[AFTER]),
    ]
    out = []
    for title, other, columns, limit in wanted:
        found = results.value("flexolmo", *columns, minus=other)
        everywhere = all(one < limit for one in found.seeds)
        below, above = found.high < limit and everywhere, found.low > limit
        verdict = "yes" if below else "no" if above else "unclear"
        wish = {"what": title, "difference": found.json(), "limit": limit, "reached": verdict}
        out.append(wish)
    return out


def _pictures(results: Results, routing: Mapping[str, np.ndarray], out: Path) -> None:
    config = results.config
    columns = [c for c in results.columns if c != AFTER]
    shown = {
        title: {c: results.value(name, c).mean for c in columns}
        for name, title in titles(config).items()
        if all(results.has(name, c) for c in columns)
    }
    heat_map(shown, out / "methods.png", baseline="public anchor")
    plots.change_map(
        [f"without {name}" for name in config.owners], columns, removal(results, columns),
        out / "removal.png", title="Each expert switched off: change from all experts",
    )  # fmt: skip
    plots.routing_map(
        routing, config.domains, out / "routing.png", title="Mean weight of each expert, in %"
    )
    level = {
        "public anchor": results.owners_mean("anchor").mean,
        "oracle: own anchor + expert": results.owners_mean("oracle").mean,
    }
    ticks, lines = _top_k(results)
    plots.curves(
        ticks, lines, out / "top_k.png", title="Mean over the owners' domains", level=level,
        labels=("experts a token may use", "bits per byte (lower is better)"),
    )  # fmt: skip
    counts, names = _growth(config)
    plots.curves(
        counts,
        {domain: [_change(results, name, domain) for name in names] for domain in config.domains},
        out / "owners.png", title="Experts added one by one, in the order of the legend",
        labels=("owners in the merged model", "change in bits per byte from the anchor"),
        level={"no change": 0.0}, shares=True,
    )  # fmt: skip


def _change(results: Results, method: str, column: str) -> tuple[float, float]:
    """From the anchor, as a share; and its standard deviation over seeds."""
    start = results.value("anchor", column).mean
    value = results.value(method, column, minus="anchor")
    return value.mean / start, value.spread / start


def _point(value: Value) -> tuple[float, float]:
    return value.mean, value.spread


def _top_k(results: Results) -> tuple[list[str], dict[str, list[tuple[float, float]]]]:
    ticks = [k for k in (*map(str, results.config.active), "all")]
    ticks = [k for k in ticks if f"flexolmo_top{k}" in results.methods]
    families = {"flexolmo": "FlexOlmo, routed as chosen", "paper": "FlexOlmo, paper's form"}
    return ticks, {
        title: [_point(results.owners_mean(f"{name}_top{k}")) for k in ticks]
        for name, title in families.items()
    }


def _growth(config: StudyConfig) -> tuple[list[str], list[str]]:
    """Numbers of owners, and the methods that hold so many."""
    most = len(config.owners)
    counts = range(2, most + 1)
    return [str(n) for n in counts], [f"owners.{n}" if n < most else "flexolmo" for n in counts]


def removal(results: Results, columns: Sequence[str]) -> np.ndarray:
    """Relative change of every column when each owner is switched off: float [owners, columns]."""
    whole = [results.value("flexolmo", c).mean for c in columns]
    rows = [
        [results.value(f"without.{owner}", c).mean for c in columns]
        for owner in results.config.owners
    ]
    return np.asarray(rows) / np.asarray(whole) - 1


# The page


def _page(results: Results, report: dict[str, Any]) -> list[str]:
    config = results.config
    seeds = ", ".join(map(str, report["seeds"]))
    counts = report["sequences"]["heldout.public"]
    mixed = report["sequences"][f"heldout.{MIXED}"]["sequences"]
    expert_tokens = config.expert.steps * config.expert.data.batch_size * config.length
    anchor_tokens = config.anchor.steps * config.anchor.data.batch_size * config.length
    minutes = sum(sum(one.values()) for one in report["minutes"].values())
    minutes += sum(report["minutes_shared"].values())
    return [
        "# The study",
        "",
        f"Seeds {seeds}; {report['machine']}; {minutes:.0f} minutes in all. Texts: "
        f"`{Path(config.texts).name}`. Width {config.model.width}, {config.model.num_layers} "
        f"layers, {config.length} tokens. The anchor saw {anchor_tokens:,} tokens; every expert "
        f"and every dense model {expert_tokens:,} of its owner's.",
        "",
        "Bits per byte on documents that no training saw, lower is better: the mean over seeds. "
        f"Scored are up to {config.test_sequences} sequences a domain (public: "
        f"{counts['sequences']} of {counts['documents']} documents) and {mixed} mixed ones, which "
        "change from one domain to another in the middle; *after the change* is their second "
        "half. *owners* is the mean over the owners' domains, with its 95% interval (documents "
        "drawn again with replacement) and its standard deviation over seeds. All choices were "
        "made on other documents (below).",
        "",
        "![methods x domains](methods.png)",
        "",
        *_methods_table(results),
        "",
        "BTM weighs whole models by how well they predicted the text so far; within the prefix "
        "all answer alike. Prompt routing answers with the anchor within the prompt, then with "
        "the model of the domain that a classifier of all domains' texts names. The oracle is "
        "told the domain.",
        "",
        "## What was to be reached",
        "",
        "FlexOlmo, routed as chosen, less the other method, paired; owners' mean or mixed "
        "sequences. *yes*: the interval is below the limit, and so is every seed.",
        "",
        *_targets_table(report["targets"]),
        "",
        "## How much of each expert's gain is kept",
        "",
        "(anchor - merged) / (anchor - the expert answering alone), on the owner's own domain; "
        "and how much worse than the anchor public text is.",
        "",
        *_kept_table(results, report["kept"]),
        "",
        "What a feed-forward expert behind the frozen anchor gains of what a dense fine-tune "
        "does, at equal tokens: " + _gains(results) + ".",
        "",
        "## Switched off, and added later",
        "",
        "Change in bits per byte when one expert is switched off (all others stay); read the "
        "other way, it is what the domain brings when it is added later.",
        "",
        "![removal](removal.png)",
        "",
        *_removal_table(results),
        "",
        "![owners](owners.png)",
        "",
        *_growth_table(results),
        "",
        "## Which expert reads what",
        "",
        "![routing](routing.png)",
        "",
        "## Left out, and top-k",
        "",
        *_ablations_table(results),
        "",
        "![top-k](top_k.png)",
        "",
        *_top_k_table(results),
        "",
        "## What was chosen, on the tuning split",
        "",
        "By the mean of two numbers: the mean over all domains, and the mixed sequences.",
        "",
        *_choices_table(results),
        "",
        "## Where the time went (minutes)",
        "",
        *_minutes_table(report),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    lines = [head, ruler, *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _bits(value: Value) -> str:
    return f"{value.mean:.3f}"


def _interval(value: Value) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}] ±{value.spread:.3f}"


def _methods_table(results: Results) -> list[str]:
    rows = []
    for name, title in titles(results.config).items():
        cells = [
            _bits(results.value(name, c)) if results.has(name, c) else "" for c in results.columns
        ]
        rows.append([title, *cells, _interval(results.owners_mean(name))])
    return _table(["", *results.columns, "owners"], rows)


def _targets_table(targets: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for one in targets:
        found = one["difference"]
        seeds = ", ".join(f"{seed:+.3f}" for seed in found["seeds"])
        numbers = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        rows.append([one["what"], f"{one['limit']:.3f}", numbers, seeds, one["reached"]])
    return _table(["", "limit", "difference", "by seed", "reached"], rows)


def _kept_table(results: Results, kept: Mapping[str, Mapping[str, float]]) -> list[str]:
    owners = results.config.owners
    rows = []
    for name, row in kept.items():
        cells = [f"{row[owner]:.0%}" for owner in owners]
        mean = f"{np.mean([row[owner] for owner in owners]):.0%}"
        title = titles(results.config)[name]
        rows.append([title, *cells, mean, f"{results.public_cost(name):+.1%}"])
    return _table(["", *owners, "mean", "public cost"], rows)


def _gains(results: Results) -> str:
    shares = []
    for owner in results.config.owners:
        anchor, own, dense = (
            results.value(name, owner).mean
            for name in ("anchor", f"alone.{owner}", f"dense.{owner}")
        )
        shares.append(f"{owner} {(anchor - own) / (anchor - dense):.0%}")
    return ", ".join(shares)


def _removal_table(results: Results) -> list[str]:
    columns = results.columns
    change = removal(results, columns)
    anchor = [results.value("anchor", owner).mean for owner in results.config.owners]
    rows = []
    for owner, row, public in zip(results.config.owners, change, anchor, strict=True):
        own = results.value(f"without.{owner}", owner).mean / public - 1
        rows.append([f"without {owner}", *(f"{value:+.1%}" for value in row), f"{own:+.1%}"])
    return _table(["", *columns, "own domain, against the anchor"], rows)


def _growth_table(results: Results) -> list[str]:
    counts, names = _growth(results.config)
    rows = []
    for count, name in zip(counts, names, strict=True):
        newest = results.config.owners[int(count) - 1]
        cells = [_bits(results.value(name, c)) for c in results.columns]
        rows.append([f"{count} owners (+ {newest})", *cells])
    return _table(["", *results.columns], rows)


def _ablations_table(results: Results) -> list[str]:
    rows = []
    for name, title in ablation_titles().items():
        cells = [_bits(results.value(name, c)) for c in results.columns]
        rows.append([title, *cells, _interval(results.owners_mean(name))])
    return _table(["", *results.columns, "owners"], rows)


def _top_k_table(results: Results) -> list[str]:
    ticks, _ = _top_k(results)
    rows = []
    for family, title in (("flexolmo", "routed as chosen"), ("paper", "paper's form")):
        for k in ticks:
            name = f"{family}_top{k}"
            cells = [_bits(results.value(name, c)) for c in results.columns]
            rows.append([f"{title}, top-{k}", *cells, _interval(results.owners_mean(name))])
    return _table(["", *results.columns, "owners"], rows)


def _choices_table(results: Results) -> list[str]:
    rows = []
    for seed, choices in results.choices.items():
        for family, title in (("flexolmo", "FlexOlmo"), ("btx", "BTX")):
            one = choices[family]
            memory = "none" if one["memory"] is None else "{:g}, {:g}".format(*one["memory"])
            text = f"{one['router']} rows, memory {memory}, top-{one['active'] or 'all'}"
            rows.append([title, str(seed), text])
        rows.append(["weighted soup", str(seed), f"temperature {choices['soup']['temperature']:g}"])
        rows += [
            [f"BTM top-{k}", str(seed), f"decay {choices[f'btm_top{k}']['decay']:g}"]
            for k in (1, 2)
        ]
    return _table(["", "seed", "chosen"], rows)


def _minutes_table(report: dict[str, Any]) -> list[str]:
    kinds = dict.fromkeys(kind for one in report["minutes"].values() for kind in one)
    head = ["", *(f"seed {seed}" for seed in report["minutes"])]
    rows = [
        [kind, *(f"{one.get(kind, 0.0):.1f}" for one in report["minutes"].values())]
        for kind in kinds
    ]
    shared = sum(report["minutes_shared"].values())
    rows.append([f"texts and the like, once: {shared:.1f}", *[""] * (len(head) - 1)])
    return _table(head, rows)
