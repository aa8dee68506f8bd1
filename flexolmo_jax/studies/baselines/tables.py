"""The tables of a study's report, and the titles of its methods."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.results import Results, Value
from flexolmo_jax.studies.engine.report import table


class Form(NamedTuple):
    """A merged model that is grown by owners, and whose experts are switched off.

    Attributes:
      merged: the method with all experts.
      without, owners: begin the names of the methods that lack experts.
      removal_figure: file name.
    """

    merged: str
    without: str
    owners: str
    removal_figure: str


FORMS = (
    Form("flexolmo", "without", "owners", "removal.png"),
    Form("evidence", "evidence_without", "evidence_owners", "removal_evidence.png"),
)


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
        **(_headed_titles() if config.has_heads else {}),
        **{
            f"unrestricted_{times:g}x": f"unrestricted MoE, {times:g}x FLOPs"
            for times in config.unrestricted_flops
        },
        "oracle": "oracle: each domain's own anchor + expert",
        "told_dense": "told the domain: its dense model",
        **(_headed_oracles() if config.has_heads else {}),
    }


def _headed_titles() -> dict[str, str]:
    return {
        "headed_rows": "FlexOlmo + heads, routed by rows",
        "evidence": "FlexOlmo + heads, routed by evidence",
        "btx_evidence": "BTX + heads, routed by evidence",
        "btm_headed_running_top2": "FlexOlmo + heads, as whole models, BTM top-2, running",
        "btm_headed_decay_top2": "FlexOlmo + heads, as whole models, BTM top-2, decayed",
    }


def _headed_oracles() -> dict[str, str]:
    return {
        "told_headed": "told the domain: its expert with a head, alone",
        "best_token": "told the token: the best of these experts and the anchor",
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


def top_k(results: Results) -> tuple[list[str], dict[str, list[tuple[float, float]]]]:
    """Numbers of active experts, and the owners' mean and spread of each family for each."""
    ticks = [k for k in (*map(str, results.config.active), "all")]
    ticks = [k for k in ticks if f"flexolmo_top{k}" in results.methods]
    families = top_k_families(results.config)
    return ticks, {
        title: [_mean_and_spread(results.owners_mean(f"{name}_top{k}")) for k in ticks]
        for name, title in families.items()
    }


def top_k_families(config: StudyConfig) -> dict[str, str]:
    """Titles of the methods that are compared with several numbers of active experts."""
    evidence = {"evidence": "FlexOlmo + heads, by evidence"} if config.has_heads else {}
    return {
        "flexolmo": "FlexOlmo, routed as chosen", "paper": "FlexOlmo, paper's form", **evidence
    }  # fmt: skip


def _mean_and_spread(value: Value) -> tuple[float, float]:
    return value.mean, value.spread


def growth(config: StudyConfig, form: Form) -> tuple[list[str], list[str]]:
    """Numbers of owners, and the methods that merge that number of owners."""
    total = len(config.owners)
    counts = range(2, total + 1)
    names = [f"{form.owners}.{n}" if n < total else form.merged for n in counts]
    return [str(n) for n in counts], names


def removal(results: Results, columns: Sequence[str], form: Form) -> np.ndarray:
    """Relative change of every column when each owner is switched off: float [owners, columns]."""
    merged = [results.value(form.merged, c).mean for c in columns]
    rows = [
        [results.value(f"{form.without}.{owner}", c).mean for c in columns]
        for owner in results.config.owners
    ]
    return np.asarray(rows) / np.asarray(merged) - 1


def _bits(value: Value) -> str:
    return f"{value.mean:.3f}"


def _interval(value: Value) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}] ±{value.spread:.3f}"


def methods_table(results: Results) -> list[str]:
    """The scores of all methods."""
    rows = []
    for name, title in titles(results.config).items():
        cells = [
            _bits(results.value(name, c)) if results.has(name, c) else "" for c in results.columns
        ]
        rows.append([title, *cells, _interval(results.owners_mean(name))])
    return table(["", *results.columns, "owners"], rows)


def targets_table(targets: Sequence[dict[str, Any]]) -> list[str]:
    """What should be reached, and whether it is."""
    rows = []
    for target in targets:
        value = target["difference"]
        seeds = ", ".join(f"{seed:+.3f}" for seed in value["seeds"])
        numbers = f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
        rows.append([target["what"], f"{target['limit']:.3f}", numbers, seeds, target["reached"]])
    return table(["", "limit", "difference", "by seed", "reached"], rows)


def kept_table(results: Results, kept: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What merged models keep of each expert's gain."""
    owners = results.config.owners
    rows = []
    for name, row in kept.items():
        cells = [f"{row[owner]:.0%}" for owner in owners]
        mean = f"{np.mean([row[owner] for owner in owners]):.0%}"
        title = titles(results.config)[name]
        rows.append([title, *cells, mean, f"{results.public_cost(name):+.1%}"])
    return table(["", *owners, "mean", "public cost"], rows)


def gains(results: Results, alone: str) -> str:
    """What an expert alone gains of what its owner's dense model does, owner by owner.

    Args:
      results: of the study.
      alone: begins the names of the experts answering alone.
    """
    shares = []
    for owner in results.config.owners:
        anchor, own, dense = (
            results.value(name, owner).mean
            for name in ("anchor", f"{alone}.{owner}", f"dense.{owner}")
        )
        shares.append(f"{owner} {(anchor - own) / (anchor - dense):.0%}")
    return ", ".join(shares)


def removal_table(results: Results, form: Form) -> list[str]:
    """What changes when each owner is switched off."""
    columns = results.columns
    change = removal(results, columns, form)
    anchor = [results.value("anchor", owner).mean for owner in results.config.owners]
    rows = []
    for owner, row, public in zip(results.config.owners, change, anchor, strict=True):
        own = results.value(f"{form.without}.{owner}", owner).mean / public - 1
        rows.append([f"without {owner}", *(f"{value:+.1%}" for value in row), f"{own:+.1%}"])
    return table(["", *columns, "own domain, against the anchor"], rows)


def headed_table(results: Results) -> list[str]:
    """Experts with heads on their own domains, alone, as a pair, and merged."""
    methods = {
        "public anchor": "anchor", "dense": "dense.{}", "alone": "headed_alone.{}",
        "pair": "headed.{}", "merged, by evidence": "evidence", "merged, by rows": "headed_rows",
        "all but this one, by evidence": "evidence_without.{}",
    }  # fmt: skip
    rows = []
    for owner in results.config.owners:
        values = [results.value(name.format(owner), owner) for name in methods.values()]
        rows.append([owner, *map(_bits, values)])
    return table(["", *methods], rows)


def costs_table(costs: Mapping[str, Mapping[str, float]]) -> list[str]:
    """FLOPs and weights of the methods."""
    names = {
        "anchor": "public anchor, dense, soups", "prompt_routing": "prompt routing",
        "btm_decay_top2": "BTM", "btx_best": "BTX", "paper_topall": "FlexOlmo, paper's form",
        "flexolmo": "FlexOlmo, routed as chosen",
        "headed_rows": "FlexOlmo + heads, routed by rows",
        "evidence": "FlexOlmo + heads, routed by evidence",
        "evidence_top4": "by evidence, 4 active experts",
        "evidence_top2": "by evidence, 2 active experts",
    }  # fmt: skip
    rows = []
    for name, cost in costs.items():
        if name in names or name.startswith("unrestricted"):
            title = names.get(name, name.replace("_", " MoE, "))
            flops = f"{cost['flops'] / 1e6:.2f}M ({cost['flops_of_btm']:.0%})"
            weights = f"{cost['parameters'] / 1e6:.2f}M ({cost['parameters_of_btm']:.0%})"
            rows.append([title, flops, weights])
    return table(["", "FLOPs a token", "weights"], rows)


def rates_table(choices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The learning rates that were tried, the chosen ones in bold."""
    rows = []
    for kind, choice in choices.items():
        for one in choice["tried"]:
            rates = "{:g}, {:g}".format(*one["rates"])
            bold = "**" if one["rates"] == choice["chosen"] else ""
            rows.append([kind, f"{bold}{rates}{bold}", f"{one['tune']:.3f}"])
    return table(["", "rates", "bits per byte"], rows)


def growth_table(results: Results, form: Form) -> list[str]:
    """Merged models of more and more owners."""
    counts, names = growth(results.config, form)
    rows = []
    for count, name in zip(counts, names, strict=True):
        newest = results.config.owners[int(count) - 1]
        cells = [_bits(results.value(name, c)) for c in results.columns]
        rows.append([f"{count} owners (+ {newest})", *cells])
    return table(["", *results.columns], rows)


def ablations_table(results: Results) -> list[str]:
    """The forms of FlexOlmo that lack something."""
    rows = []
    for name, title in ablation_titles().items():
        cells = [_bits(results.value(name, c)) for c in results.columns]
        rows.append([title, *cells, _interval(results.owners_mean(name))])
    return table(["", *results.columns, "owners"], rows)


def top_k_table(results: Results) -> list[str]:
    """Numbers of active experts."""
    ticks, _ = top_k(results)
    rows = []
    for family, title in top_k_families(results.config).items():
        for k in ticks:
            name = f"{family}_top{k}"
            cells = [_bits(results.value(name, c)) for c in results.columns]
            rows.append([f"{title}, top-{k}", *cells, _interval(results.owners_mean(name))])
    return table(["", *results.columns, "owners"], rows)


def choices_table(results: Results) -> list[str]:
    """What was chosen on the tuning split, by seed."""
    rows = []
    for seed, choices in results.choices.items():
        families = {
            "flexolmo": "FlexOlmo",
            "btx": "BTX",
            "headed_rows": "FlexOlmo + heads, by rows",
        }
        for family, title in families.items():
            if family not in choices:
                continue
            choice = choices[family]
            memory = "none" if choice["memory"] is None else "{:g}, {:g}".format(*choice["memory"])
            text = f"{choice['router']} rows, memory {memory}, top-{choice['active'] or 'all'}"
            rows.append([title, str(seed), text])
        families = {
            "evidence": "FlexOlmo + heads, by evidence", "btx_evidence": "BTX + heads, by evidence"
        }  # fmt: skip
        for family, title in families.items():
            if family in choices:
                choice = choices[family]
                text = "decay {:g}, strength {:g}, shift {:g}".format(*choice["evidence"])
                text += f", top-{choice['active'] or 'all'}"
                rows.append([title, str(seed), text])
        rows.append(["weighted soup", str(seed), f"temperature {choices['soup']['temperature']:g}"])
        for family, title in (("btm", "BTM"), ("btm_headed", "FlexOlmo + heads, BTM")):
            rows += [
                [f"{title} top-{k}", str(seed), f"decay {choices[f'{family}_top{k}']['decay']:g}"]
                for k in (1, 2)
                if f"{family}_top{k}" in choices
            ]
    return table(["", "seed", "chosen"], rows)


def minutes_table(report: dict[str, Any]) -> list[str]:
    """Minutes by kind of stage."""
    kinds = dict.fromkeys(kind for one in report["minutes"].values() for kind in one)
    head = ["", *(f"seed {seed}" for seed in report["minutes"])]
    rows = [
        [kind, *(f"{one.get(kind, 0.0):.1f}" for one in report["minutes"].values())]
        for kind in kinds
    ]
    shared, rates = (sum(report[name].values()) for name in ("minutes_shared", "minutes_rates"))
    for title, minutes in (("shared by all seeds", shared), ("rates that were not chosen", rates)):
        rows.append([f"{title}: {minutes:.1f}", *[""] * (len(head) - 1)])
    return table(head, rows)
