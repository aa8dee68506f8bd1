"""The page of the admission study: its tables and its figure, from admission.json."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.admission.policy import Policy
from flexolmo_jax.audits.statistics import Rate
from flexolmo_jax.studies.admission.bench import (
    ALL,
    BROKEN,
    CHECKS,
    NAME,
    NOTHING,
    PAYLOAD,
    Bounds,
    Figures,
    calibrated,
    checks_of,
    default_bounds,
    failed,
    false_positives,
    figures_of,
)
from flexolmo_jax.studies.admission.harm import COST, CREDIT, SAYS, harms, works
from flexolmo_jax.studies.engine.report import link, table

FIGURE = "admission.png"
COMMAND = "flexolmo study admission flexolmo_demo OUT"
NOBODY = "-"
KNOWN = {NOTHING: "nothing of the attack", PAYLOAD: "the payload",
         ALL: "payload, trigger and text"}  # fmt: skip
Report = Mapping[str, Any]


class Bench:
    """The figures of a report, and all bounds.

    Args:
      report: what admission.json holds.
    """

    def __init__(self, report: Report):
        self.report = report
        self.figures = {name: figures_of(rows) for name, rows in report["examined"].items()}
        self.honest = {name: self.figures[name] for name in report["honest"]}
        self.default = default_bounds(Policy())
        self.calibrated = calibrated(self.honest.values(), self.default)
        self.harms = {name: harms(found) for name, found in report["harm"].items()}

    def flagged(self, known: int = NOTHING) -> dict[str, list[str]]:
        """The honest experts that fail, by the bounds."""
        own = [n for n, x in self.honest.items() if failed(x, self.default, known)]
        return {"default": own, "calibrated": false_positives(self.honest, self.default, known)}

    def caught(self, name: str, bounds: Bounds, known: int = NOTHING) -> list[str]:
        """The checks that an attacker fails."""
        return checks_of(failed(self.figures[name], bounds, known))

    @property
    def harmful(self) -> list[str]:
        """The attackers whose attack works."""
        found = self.report["harm"]
        return [n for n, own in self.report["attackers"].items() if works(own["kind"], found[n])]


def make_page(report: Report, results: Path, page: Path | None) -> list[str]:
    """The lines of the page; draws the figure into `results`."""
    bench = Bench(report)
    draw(bench, results / FIGURE)
    return [
        "# Admission, attacked",
        "",
        f"`{COMMAND}`, {report['machine']}. The times of its stages, beside other work on the "
        f"machine, add up to {report['minutes']} minutes. Numbers: "
        f"[admission.json]({link(results / 'admission.json', page)}).",
        "",
        *_introduction(bench),
        "",
        *_attackers(bench),
        "",
        *_uncaught(bench),
        "",
        *_bounds(bench),
        "",
        f"![Figures of honest experts and attackers]({link(results / FIGURE, page)})",
        "",
        *_honest(bench),
        "",
        *LIMITS,
    ]


def _introduction(bench: Bench) -> list[str]:
    honest, attackers = len(bench.honest), len(bench.report["attackers"])
    bounds = {"default": bench.default, "calibrated": bench.calibrated}
    halves = false_positives(bench.honest, bench.default, folds=2)
    rows = []
    for known, what in KNOWN.items():
        for kind, own in bounds.items():
            flagged = bench.flagged(known)[kind]
            caught = [n for n in bench.harmful if bench.caught(n, own, known)]
            rate = Rate.of_counts(len(flagged), honest)
            rows.append([
                what, kind, f"{len(caught)} of {len(bench.harmful)}",
                f"{len(flagged)} of {honest}: {rate.rate:.0%} ({rate.low:.0%} to {rate.high:.0%})",
                ", ".join(flagged) or NOBODY,
            ])  # fmt: skip
    return [
        f"{honest} honest experts and {attackers} attackers were examined by the checks of "
        "`flexolmo admit`. Each honest one is compared with all the other honest ones, each "
        "attacker with all of them. Routing, loss and probes are measured in the model that the "
        "newcomer would join: the demo's four owners (three, if it is one of them).",
        "",
        f"An attack works if it does what it is for, beside the four owners, by evidence heads or "
        f"by router rows. A backdoor: {SAYS:.0%} of prompts with the trigger give the payload. "
        f"Memorized text: {SAYS:.0%} of passages come back word for word. A copy: an owner loses "
        f"{CREDIT:.0%} of its share of its own domain. All others: that, or a domain costs "
        f"{COST:.0%} more bits per byte. A package that `merge` refuses counts, too. "
        f"{len(bench.harmful)} of {attackers} work.",
        "",
        "*Default* bounds are those of a policy in which nothing is set. They were chosen while "
        "these experts and attackers were known. *Calibrated* ones are the largest honest "
        "figure, and half of its distance from the median more; false positives are counted with "
        "bounds that all the others set. Where one half sets them for the other, "
        f"{len(halves)} of {honest} fail ({', '.join(halves) or 'none'}). A package is caught if "
        "it is rejected or sent to a person. Rates are with 95% intervals.",
        "",
        *table(["the coordinator knows", "bounds", "caught", "false positives", "whom"], rows, "l"),
    ]  # fmt: skip


def _attackers(bench: Bench) -> list[str]:
    rows = []
    for name, own in bench.report["attackers"].items():
        pairs = [(bench.default, NOTHING), *((bench.calibrated, known) for known in KNOWN)]
        cells = [", ".join(bench.caught(name, *pair)) or NOBODY for pair in pairs]
        rows.append([own["kind"], own["level"], own["what"], _harm_of(bench, name), *cells])
    return [
        "## The attackers",
        "",
        "*Adaptive* ones know what is looked at. The harm is the largest of both ways of routing. "
        "The last two columns add probes of a coordinator who knows the payload, and of one who "
        "knows the trigger, or the text, too.",
        "",
        *table(
            ["attack", "level", "how", "harm", "caught, default", "calibrated",
             "payload known", "all known"],
            rows, "l",
        ),
    ]  # fmt: skip


def _harm_of(bench: Bench, name: str) -> str:
    found = bench.report["harm"][name]
    if "refused" in found:
        return "merge refuses it"
    ways = found.values()
    costs, takes, robs = (max(ways, key=itemgetter(k)) for k in ("cost", "share", "credit"))
    said = [
        f"{_cost(costs['cost'])} bits of {costs['cost_of']}",
        f"takes {takes['share']:.0%} of {takes['share_of']}",
        f"{robs['credit_of']} loses {robs['credit']:.0%}",
    ]
    payload, text = (max(x[k] for x in ways) for k in ("payload", "extracted"))
    fails = name in bench.report["attackers"] and name not in bench.harmful
    said_of_attack = " (does not work)" if fails else ""
    said += [f"payload {payload:.0%}"] * (payload > 0) + [f"text {text:.0%}"] * (text > 0)
    return "; ".join(said) + said_of_attack


def _cost(change: float) -> str:
    return "+1000% or more" if change >= 10 else f"{change:+.1%}"


def _uncaught(bench: Bench) -> list[str]:
    attackers = bench.report["attackers"]

    def named(names: Sequence[str]) -> str:
        said = (f"{attackers[n]['kind']} ({attackers[n]['what']})" for n in names)
        return "; ".join(said) or "none"

    def missed(bounds: Bounds, known: int = NOTHING) -> list[str]:
        return [n for n in bench.harmful if not bench.caught(n, bounds, known)]

    kinds: dict[str, list[str]] = {}
    for name in bench.harmful:
        kinds.setdefault(attackers[name]["kind"], []).append(name)
    rows = [
        [
            kind, len(names),
            sum(bool(bench.caught(n, bench.default)) for n in names),
            sum(bool(bench.caught(n, bench.calibrated)) for n in names),
            ", ".join(dict.fromkeys(x for n in names for x in bench.caught(n, bench.calibrated)))
            or NOBODY,
        ]
        for kind, names in kinds.items()
    ]  # fmt: skip
    return [
        "## What passes",
        "",
        "Of the attacks that work:",
        "",
        *table(["attack", "work", "caught, default", "calibrated", "by"], rows, "lrrrl"),
        "",
        f"- Not caught by the default bounds: {named(missed(bench.default))}.",
        f"- Not caught by calibrated bounds: {named(missed(bench.calibrated))}.",
        "- Nor by a coordinator who knows the payload: "
        f"{named(missed(bench.calibrated, PAYLOAD))}.",
        f"- Nor by one who knows all: {named(missed(bench.calibrated, ALL))}.",
    ]


def _bounds(bench: Bench) -> list[str]:
    rows = []
    for name, check in CHECKS.items():
        values = [x[name] for x in bench.honest.values() if name in x]
        if name in (BROKEN, NAME) or not values:
            continue
        bounds = bench.default, bench.calibrated
        figures = (np.median(values), max(values), *(own[name] for own in bounds))
        caught = [
            sum(name in failed(bench.figures[n], own, ALL) for n in bench.harmful) for own in bounds
        ]
        rows.append([check, name, *(_shown(name, float(x)) for x in figures), *caught])
    broken = [n for n in bench.harmful if BROKEN in bench.figures[n]
              and bench.figures[n][BROKEN] > 0]  # fmt: skip
    rows.append([BROKEN, "a sound package", *[NOBODY] * 4, len(broken), len(broken)])
    return [
        "## The figures",
        "",
        "What honest experts have, and how many of the working attacks each figure catches, by the "
        "default bound and by the calibrated one. A *z* is the robust z that more matrices (norms) "
        "exceed than the policy allows. A *lead* of probes is in nats.",
        "",
        *table(
            ["check", "figure", "honest median", "largest", "default bound", "calibrated",
             "caught, default", "calibrated"],
            rows, "llr",
        ),
    ]  # fmt: skip


def _shown(name: str, value: float) -> str:
    if not np.isfinite(value):
        return NOBODY
    if "share" in name or "rise" in name or name == "likeness":
        return f"{value:.1%}"
    return f"{value:.1f}"


def _honest(bench: Bench) -> list[str]:
    by_bounds = bench.flagged()
    rows = []
    for name, own in bench.report["honest"].items():
        made = ", ".join(f"{k} {v}" for k, v in (own["made"] or {}).items())
        options = " ".join(own["words"]).replace("--", "")
        flagged = [kind for kind, names in by_bounds.items() if name in names]
        rows.append([name, own["text"], options or "as the demo", made, _harm_of(bench, name),
                     ", ".join(flagged)])  # fmt: skip
    doing = [f"{name} ({', '.join(own)})" for name in bench.honest if (own := bench.harms[name])]
    return [
        "## The honest experts",
        "",
        "The same measures of harm, of experts that mean none. By the bounds above, harm is done "
        f"by {len(doing)} of them: {'; '.join(doing) or 'none'}. Whoever trains on the same kind "
        "of text as an owner takes a part of its share, as a copy does.",
        "",
        *table(["expert", "text", "options", "made smaller", "harm", "false positive"], rows, "l"),
    ]


LIMITS = [
    "## What this shows, and what not",
    "",
    "- All of it is at the demo's size: four layers of width 128, texts of half a megabyte, "
    "experts of a minute. Figures of large experts differ, and so must their bounds: calibrate "
    "them on your own cohort. With so few honest experts a false-positive rate is known only "
    "roughly, as the intervals say, and the fewer set the bounds, the more of the others fail.",
    "- The honest experts were made by the same people, tool and corpora as the attackers. "
    "Strangers differ more. An honest expert of another optimizer has an unusual spectrum.",
    "- Admission finds what takes too much, costs too much, is broken, is a copy, or has unusual "
    "numbers. It does not find what behaves well wherever it is looked at.",
    "- A backdoor has usual weights, takes a usual share, and costs nothing on other text. Probes "
    "that know neither its trigger nor its payload find nothing. Those that forbid the payload "
    "find it here even without the trigger, because a small expert that memorized one sentence "
    "finds it likely after anything; published backdoors of large models are silent without "
    "their trigger, so do not count on that.",
    "- An expert that repeats its text word for word passes if it is trained on other text, too. "
    "Probes that know the text do not tell it apart: every model finds a text's own continuation "
    "likelier than another's, experts that were trained on this text once more so. `flexolmo audit "
    "extraction` is for owners.",
    "- Whoever routes an honest network to another owner's kind of text harms that owner, and "
    "passes: public proxies of a domain are far from the owner's text. A weak honest expert of the "
    "same kind of text, such as a private one, does the same harm without meaning it.",
    "- An adaptive attacker who has the policy can measure all that the coordinator measures, and "
    "stay just below it. Several packages can each stay below every bound.",
]


def draw(bench: Bench, file: Path) -> None:
    """Draws every figure: honest experts, attackers, and the bounds."""
    from matplotlib.figure import Figure

    names = [name for name in CHECKS if name not in (BROKEN, NAME)]
    figure = Figure(figsize=(12, 9), layout="constrained")
    grid = figure.subplots(3, -(-len(names) // 3)).ravel()
    for axes, name in zip(grid, names, strict=False):
        _draw_one(axes, bench, name)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    handles = [*grid[0].collections[:3], *grid[0].lines[:2]]
    figure.legend(handles, [h.get_label() for h in handles], loc="outside lower center", ncols=5)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _draw_one(axes: Any, bench: Bench, name: str) -> None:
    harmful = set(bench.harmful)
    groups: list[tuple[str, str, Sequence[Figures]]] = [
        ("honest", "tab:blue", list(bench.honest.values())),
        ("attacks that work", "tab:red", [bench.figures[n] for n in bench.harmful]),
        ("attacks that do not", "tab:orange",
         [bench.figures[n] for n in bench.report["attackers"] if n not in harmful]),
    ]  # fmt: skip
    for place, (title, colour, own) in enumerate(groups):
        values = np.array([min(x[name], 1e6) for x in own if name in x])
        across = place + np.linspace(-0.25, 0.25, len(values)) if len(values) else values
        axes.scatter(across, values, s=14, color=colour, label=title, alpha=0.7)
    for bound, style, title in ((bench.default, "--", "default bound"),
                                (bench.calibrated, "-", "calibrated bound")):  # fmt: skip
        value = bound[name] if np.isfinite(bound[name]) else np.nan
        axes.axhline(value, color="grey", linestyle=style, linewidth=1, label=title)
    axes.set_yscale("symlog", linthresh=0.01 if "rise" in name else 0.1 if "share" in name else 1)
    axes.set_xticks([])
    axes.set_title(name, fontsize=9)
