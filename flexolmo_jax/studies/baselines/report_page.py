"""The page of a study's report: its tables, and what they mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.datasets import MIXED
from flexolmo_jax.studies.baselines.results import Results, Value
from flexolmo_jax.studies.engine.report import table


def titles(config: StudyConfig) -> dict[str, str]:
    """Titles of the methods in the first table, in its order."""
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
    """Titles of the forms of FlexOlmo that lack something."""
    return {
        "flexolmo": "FlexOlmo, routed as chosen",
        "flexolmo_without_bias": "- router bias",
        "flexolmo_bias_folded": "- router bias, which is folded into the rows",
        "flexolmo_uncoordinated": "- coordination (experts are the dense models' networks)",
        "paper_topall": "FlexOlmo, paper's form",
        "paper_without_bias": "- router bias",
        "paper_plain": "- domain embedding as the first row",
    }


def make_page(results: Results, report: dict[str, Any]) -> list[str]:
    """The lines of report.md.

    Args:
      results: of the study.
      report: what report.json holds.
    """
    return [*_comparison(results, report), "", *_analysis(results, report)]


def _comparison(results: Results, report: dict[str, Any]) -> list[str]:
    """What was trained, and the scores of all methods."""
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
        "half. *owners* is the mean over the owners' domains, with its 95% interval (a bootstrap "
        "over documents) and its standard deviation over seeds. All choices were made on other "
        "documents (below).",
        "",
        "![methods x domains](methods.png)",
        "",
        *_methods_table(results),
        "",
        "BTM weights whole models by how well they predicted the text so far; within the prefix "
        "all have equal weights. Prompt routing answers with the anchor within the prompt, then "
        "with the model of the domain that a classifier of all domains' texts predicts. The oracle "
        "knows the domain.",
        "",
        "## Targets",
        "",
        "FlexOlmo, routed as chosen, minus the other method, paired; owners' mean or mixed "
        "sequences. *yes*: the interval is below the limit, and so is every seed.",
        "",
        *_targets_table(report["targets"]),
    ]


def _analysis(results: Results, report: dict[str, Any]) -> list[str]:
    """What each expert brings, ablations, choices and times."""
    return [
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


def top_k(results: Results) -> tuple[list[str], dict[str, list[tuple[float, float]]]]:
    ticks = [k for k in (*map(str, results.config.active), "all")]
    ticks = [k for k in ticks if f"flexolmo_top{k}" in results.methods]
    families = {"flexolmo": "FlexOlmo, routed as chosen", "paper": "FlexOlmo, paper's form"}
    return ticks, {
        title: [_mean_and_spread(results.owners_mean(f"{name}_top{k}")) for k in ticks]
        for name, title in families.items()
    }


def _mean_and_spread(value: Value) -> tuple[float, float]:
    return value.mean, value.spread


def growth(config: StudyConfig) -> tuple[list[str], list[str]]:
    """Numbers of owners, and the methods that merge that number of owners."""
    total = len(config.owners)
    counts = range(2, total + 1)
    return [str(n) for n in counts], [f"owners.{n}" if n < total else "flexolmo" for n in counts]


def removal(results: Results, columns: Sequence[str]) -> np.ndarray:
    """Relative change of every column when each owner is switched off: float [owners, columns]."""
    merged = [results.value("flexolmo", c).mean for c in columns]
    rows = [
        [results.value(f"without.{owner}", c).mean for c in columns]
        for owner in results.config.owners
    ]
    return np.asarray(rows) / np.asarray(merged) - 1


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
    return table(["", *results.columns, "owners"], rows)


def _targets_table(targets: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for target in targets:
        value = target["difference"]
        seeds = ", ".join(f"{seed:+.3f}" for seed in value["seeds"])
        numbers = f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
        rows.append([target["what"], f"{target['limit']:.3f}", numbers, seeds, target["reached"]])
    return table(["", "limit", "difference", "by seed", "reached"], rows)


def _kept_table(results: Results, kept: Mapping[str, Mapping[str, float]]) -> list[str]:
    owners = results.config.owners
    rows = []
    for name, row in kept.items():
        cells = [f"{row[owner]:.0%}" for owner in owners]
        mean = f"{np.mean([row[owner] for owner in owners]):.0%}"
        title = titles(results.config)[name]
        rows.append([title, *cells, mean, f"{results.public_cost(name):+.1%}"])
    return table(["", *owners, "mean", "public cost"], rows)


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
    return table(["", *columns, "own domain, against the anchor"], rows)


def _growth_table(results: Results) -> list[str]:
    counts, names = growth(results.config)
    rows = []
    for count, name in zip(counts, names, strict=True):
        newest = results.config.owners[int(count) - 1]
        cells = [_bits(results.value(name, c)) for c in results.columns]
        rows.append([f"{count} owners (+ {newest})", *cells])
    return table(["", *results.columns], rows)


def _ablations_table(results: Results) -> list[str]:
    rows = []
    for name, title in ablation_titles().items():
        cells = [_bits(results.value(name, c)) for c in results.columns]
        rows.append([title, *cells, _interval(results.owners_mean(name))])
    return table(["", *results.columns, "owners"], rows)


def _top_k_table(results: Results) -> list[str]:
    ticks, _ = top_k(results)
    rows = []
    for family, title in (("flexolmo", "routed as chosen"), ("paper", "paper's form")):
        for k in ticks:
            name = f"{family}_top{k}"
            cells = [_bits(results.value(name, c)) for c in results.columns]
            rows.append([f"{title}, top-{k}", *cells, _interval(results.owners_mean(name))])
    return table(["", *results.columns, "owners"], rows)


def _choices_table(results: Results) -> list[str]:
    rows = []
    for seed, choices in results.choices.items():
        for family, title in (("flexolmo", "FlexOlmo"), ("btx", "BTX")):
            choice = choices[family]
            memory = "none" if choice["memory"] is None else "{:g}, {:g}".format(*choice["memory"])
            text = f"{choice['router']} rows, memory {memory}, top-{choice['active'] or 'all'}"
            rows.append([title, str(seed), text])
        rows.append(["weighted soup", str(seed), f"temperature {choices['soup']['temperature']:g}"])
        rows += [
            [f"BTM top-{k}", str(seed), f"decay {choices[f'btm_top{k}']['decay']:g}"]
            for k in (1, 2)
        ]
    return table(["", "seed", "chosen"], rows)


def _minutes_table(report: dict[str, Any]) -> list[str]:
    kinds = dict.fromkeys(kind for one in report["minutes"].values() for kind in one)
    head = ["", *(f"seed {seed}" for seed in report["minutes"])]
    rows = [
        [kind, *(f"{one.get(kind, 0.0):.1f}" for one in report["minutes"].values())]
        for kind in kinds
    ]
    shared = sum(report["minutes_shared"].values())
    rows.append([f"shared by all seeds: {shared:.1f}", *[""] * (len(head) - 1)])
    return table(head, rows)
