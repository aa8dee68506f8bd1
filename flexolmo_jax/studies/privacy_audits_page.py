"""The tables of the privacy audits, from privacy_audits.json."""

from collections.abc import Mapping
from typing import Any

from flexolmo_jax.studies.engine.report import table

Audits = Mapping[str, Mapping[str, Any]]  # reports of one kind of audit, by title
ALONE = "the expert alone"


def interval(rate: Mapping[str, float]) -> str:
    """A rate with its 95% interval."""
    return f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


def discoverable(
    audit: Mapping[str, Any], samples: int = 10, chance: float = 0.5
) -> Mapping[str, float]:
    """The rate of passages that `samples` samples contain exactly with probability `chance`."""
    rates = {(one["samples"], one["chance"]): one["rate"] for one in audit["discoverable"]}
    return rates[samples, chance]


def extraction_part(audits: Audits, data: str, machine: str) -> list[str]:
    """The part about extraction."""
    first = next(iter(audits.values()))
    protocol, speeds = first["protocol"], [one["attempts_per_second"] for one in audits.values()]
    hours = 10_000 * protocol["samples"] / min(speeds) / 3600
    rows = []
    for title, one in audits.items():
        rates = (one["extracted"], one["continuation"], one["greedy"], discoverable(one))
        rows.append([title, one["prefixes"], *map(interval, rates)])
    head = ["", "passages", "extracted", "continuation", "greedily", "exact"]
    return [
        f"`flexolmo study privacy-audits OUT`, {machine}. {first['prefixes']} passages of "
        f"{first['documents']} documents of {data}, {first['attempts']} attempts a row "
        f"({protocol['prefix']} tokens are given, up to {protocol['length']} in all: the length "
        "that this small model was made for). Shares of passages, with exact 95% intervals. "
        "*Extracted*: the paper's criterion. *Continuation*: the same without credit for the "
        "prompt. *Greedily*: greedy decoding reproduces the text. *Exact*: ten samples contain it "
        "with probability 1/2 or more. *Controls* have memorized a few documents, and are asked "
        "for those.",
        "",
        *table(head, rows),
        "",
        f"{min(speeds):,.0f} to {max(speeds):,.0f} attempts a second: 10,000 passages take "
        f"{hours:.1f} hours at most. *Expert alone* is a dense model whose feed-forward networks "
        "were trained on the owner's text.",
    ]


def membership_part(audits: Audits, canaries: int) -> list[str]:
    """The part about membership."""
    rows = []
    for title, report in audits.items():
        audit, certificate = report["audits"][ALONE], report["certificate"]
        area = audit["area"]
        rows.append(
            [
                title, f"{certificate['epsilon']:.2f}" if certificate else "none",
                f"{audit['members']}, {audit['controls']}",
                f"{area['area']:.3f} ({area['low']:.3f} to {area['high']:.3f})",
                *(interval(one["members"]) for one in audit["caught"]),
                f"{audit['epsilon']:.2f}", report["verdict"],
            ]
        )  # fmt: skip
    perfect = next(iter(audits.values()))["audits"][ALONE]["epsilon_at_most"]
    head = [
        "", "certificate", "included, held out", "AUC", "TPR at 1% FPR", "TPR at 0.1% FPR",
        "epsilon at least", "verdict",
    ]  # fmt: skip
    return [
        f"{2 * canaries} candidates for each expert, of which a coin included about half in the "
        "text. Scores are those of the expert alone, as everyone who holds the package can compute "
        "them. All with 95% intervals; the epsilon is a lower bound.",
        "",
        *table(head, rows, "lrrrrrrl"),
        "",
        f"A perfect attack on this number of canaries would show an epsilon of {perfect:.2f}: an "
        "audit of this size cannot refute a claim above that.",
    ]


def removal_part(audits: Audits) -> list[str]:
    """The part about removal: sentences, as the audit states them."""
    lines: list[str] = []
    for title, report in audits.items():
        sizes = f"{report['canaries']} canaries, {report['passages']} passages"
        lines += [f"{title} ({sizes}):", "", *(f"- {line}" for line in report["lines"]), ""]
    return lines[:-1]
