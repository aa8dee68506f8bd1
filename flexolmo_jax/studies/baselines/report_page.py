"""The page of a study's report: its tables, and what they mean."""

from pathlib import Path
from typing import Any

from flexolmo_jax.studies.baselines.datasets import MIXED
from flexolmo_jax.studies.baselines.results import Results
from flexolmo_jax.studies.baselines.tables import (
    FORMS,
    ablations_table,
    choices_table,
    costs_table,
    gains,
    growth_table,
    headed_table,
    kept_table,
    methods_table,
    minutes_table,
    rates_table,
    removal_table,
    targets_table,
    top_k_table,
)


def make_page(results: Results, report: dict[str, Any]) -> list[str]:
    """The lines of report.md.

    Args:
      results: of the study.
      report: what report.json holds.
    """
    evidence = ["", *_evidence(results)] if results.config.has_heads else []
    choices = _choices(results, report)
    return [*_comparison(results, report), *evidence, "", *_analysis(results), "", *choices]


def _comparison(results: Results, report: dict[str, Any]) -> list[str]:
    """What was trained, and the scores of all methods."""
    config = results.config
    seeds = ", ".join(map(str, report["seeds"]))
    counts = report["sequences"]["heldout.public"]
    mixed = report["sequences"][f"heldout.{MIXED}"]["sequences"]
    expert_tokens = config.expert.steps * config.expert.data.batch_size * config.length
    anchor_tokens = config.anchor.steps * config.anchor.data.batch_size * config.length
    minutes = sum(sum(one.values()) for one in report["minutes"].values())
    minutes += sum(report["minutes_shared"].values()) + sum(report["minutes_rates"].values())
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
        *methods_table(results),
        "",
        "BTM weights whole models by how well they predicted the text so far; within the prefix "
        "all have equal weights. Prompt routing answers with the anchor within the prompt, then "
        "with the model of the domain that a classifier of all domains' texts predicts. The "
        "oracle, and what is told the domain, know it; what is told the token is the model that "
        "costs the token least: no router that picks one of them for each token can do better.",
        "",
        "## Targets",
        "",
        "FlexOlmo minus the other method, paired; owners' mean unless another column is named. "
        "*By rows*: experts without heads, routed as chosen. *yes*: the interval is below the "
        "limit, and so is every seed.",
        "",
        *targets_table(report["targets"]),
        "",
        "## What a token costs",
        "",
        "FLOPs of matrix products that a token needs, and all weights that are held; in brackets, "
        "of what BTM needs, which asks all models to weigh them.",
        "",
        *costs_table(report["costs"]),
        "",
        "## How much of each expert's gain is kept",
        "",
        "(anchor - merged) / (anchor - the expert answering alone), on the owner's own domain; "
        "and how much worse than the anchor public text is.",
        "",
        *kept_table(results, report["kept"]),
        "",
        "What a feed-forward expert behind the frozen anchor gains of what a dense fine-tune "
        "does, at equal tokens: " + gains(results, "alone") + ".",
    ]


def _evidence(results: Results) -> list[str]:
    """Experts with heads, owner by owner."""
    return [
        "## FlexOlmo + heads, routed by evidence",
        "",
        "Each expert has a low-rank head of its own, and one to be routed by (docs/study.md). "
        "*Alone* is the expert answering every token, *pair* the anchor and this expert, *merged* "
        "all of them. What such an expert gains alone of what a dense fine-tune "
        "does: " + gains(results, "headed_alone") + ".",
        "",
        *headed_table(results),
        "",
        "Each expert switched off, change from all experts; and owners added one by one:",
        "",
        f"![removal]({FORMS[1].removal_figure})",
        "",
        *removal_table(results, FORMS[1]),
        "",
        *growth_table(results, FORMS[1]),
        "",
        "![routing](routing_evidence.png)",
    ]


def _analysis(results: Results) -> list[str]:
    """What each expert without heads brings when it is routed by rows; ablations."""
    return [
        "## Routed by rows: switched off, and added later",
        "",
        "Change in bits per byte when one expert is switched off (all others stay); read the "
        "other way, it is what the domain brings when it is added later.",
        "",
        "![removal](removal.png)",
        "",
        *removal_table(results, FORMS[0]),
        "",
        "![owners](owners.png)",
        "",
        *growth_table(results, FORMS[0]),
        "",
        "## Which expert reads what",
        "",
        "![routing](routing.png)",
        "",
        "## Routed by rows: left out, and top-k",
        "",
        *ablations_table(results),
        "",
        "![top-k](top_k.png)",
        "",
        *top_k_table(results),
    ]


def _choices(results: Results, report: dict[str, Any]) -> list[str]:
    """What was chosen, and times."""
    rates = [
        "",
        "Learning rates of matrices and of all else, chosen with the anchor of seed 0 for all "
        "seeds; bits per byte on the tuning split, of the anchor on public text, of the "
        "unrestricted mixture the mean of the two numbers, of the others the mean over owners.",
        "",
        *rates_table(report["rates"]),
    ]
    return [
        "## What was chosen, on the tuning split",
        "",
        "By the mean of two numbers: the mean over all domains, and the mixed sequences.",
        "",
        *choices_table(results),
        *(rates if report["rates"] else []),
        "",
        "## Where the time went (minutes)",
        "",
        *minutes_table(report),
    ]
