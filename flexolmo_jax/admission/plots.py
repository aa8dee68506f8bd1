"""The figures of a report: the new expert beside the cohort."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from flexolmo_jax.admission.results import Report, Result
from flexolmo_jax.admission.spectral import Figures
from flexolmo_jax.federation.names import PUBLIC

NEW, OTHERS, BOUND = "#b45309", "#8a867e", "#b91c1c"
TITLES = {
    "largest": "largest singular value",
    "norm": "Frobenius norm",
    "energy": "energy of the largest",
    "entropy": "entropy, of its maximum",
    "kurtosis": "kurtosis of the entries",
}


class Plot(NamedTuple):
    """A figure in a page.

    Attributes:
      title: what it shows.
      png: base64 of the image.
    """

    title: str
    png: str


def plots(report: Report) -> list[Plot]:
    """The figures of what was measured; nothing that was not."""
    drawn = []
    for result in report.results:
        for key, (title, draw) in _DRAWN.items():
            if result.details.get(key) and (figure := draw(result)) is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=110)
                png = base64.b64encode(buffer.getvalue()).decode()
                drawn.append(Plot(title.format(result.measured), png))
    return drawn


def _matrices(result: Result) -> Figure:
    """Each figure of all matrices, or the norms: the cohort in grey, the new expert over it."""
    rows: Mapping[str, Any] = result.details["figures"]
    kinds = {name.rpartition(".")[2] for name in rows}
    panels: dict[str, dict[str, Any]]
    if kinds == set(Figures._fields):
        panels = {
            TITLES[kind]: {n.rpartition(".")[0]: r for n, r in rows.items() if n.endswith(kind)}
            for kind in Figures._fields
        }
    else:
        panels = {"norm": dict(rows)}
    figure = Figure(figsize=(9, 1.5 * len(panels) + 1), layout="constrained")
    for number, (title, own) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(len(panels), 1, number)
        for at, row in enumerate(own.values()):
            axes.plot([at] * len(row["cohort"]), row["cohort"], ".", color=OTHERS, markersize=5)
            axes.plot(at, row["value"], "D", color=NEW, markersize=5)
        if all(x > 0 for row in own.values() for x in (row["value"], *row["cohort"])):
            axes.set_yscale("log")
        axes.set_ylabel(title.replace(" of the ", "\nof the "), fontsize=7)
        is_last = number == len(panels)
        axes.set_xticks(range(len(own)), list(own) if is_last else [""] * len(own), rotation=60)
        axes.tick_params(which="both", labelsize=7)
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks("{x:.3g}")
    return figure


def _shares(result: Result) -> Figure | None:
    """The share of each expert, layer by layer, of each text."""
    texts = result.details["shares"]
    if isinstance(texts, Sequence):
        texts = {"public text": texts}
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (title, rows) in zip(
        np.atleast_1d(figure.subplots(1, len(texts), sharey=True)), texts.items(), strict=True
    ):
        for number, row in enumerate(rows):
            is_new = number == 1
            layers = row["layers"]
            axes.plot(
                layers, "o-", color=NEW if is_new else OTHERS, zorder=3 if is_new else 2,
                markersize=4,
            )  # fmt: skip
            if is_new or row["expert"] in (PUBLIC, title):
                axes.annotate(
                    row["expert"], (len(layers) - 1, layers[-1]), fontsize=7, ha="right",
                    va="bottom", color=NEW if is_new else "black",
                )  # fmt: skip
        axes.axhline(result.bound, color=BOUND, linestyle="--", linewidth=1)
        axes.set_title(title, fontsize=8)
        axes.set_ylim(0, 1)
        axes.set_xticks(range(len(rows[0]["layers"])))
        axes.set_xlabel("layer" if len(rows[0]["layers"]) > 1 else "all layers", fontsize=7)
        axes.tick_params(labelsize=7)
    return figure


def _domains(result: Result) -> Figure:
    """Bits per byte of each domain's proxies, with the new expert and without."""
    rows = result.details["domains"]
    at = np.arange(len(rows))
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots()
    for shift, key, colour in ((-0.2, "without", OTHERS), (0.2, "with", NEW)):
        heights = [np.nan_to_num(row[key], nan=0.0) for row in rows.values()]
        axes.bar(at + shift, heights, 0.38, color=colour, label=f"{key} it")
    axes.set_xticks(at, list(rows))
    axes.set_ylabel("bits per byte", fontsize=8)
    axes.legend(fontsize=7)
    axes.tick_params(labelsize=8)
    return figure


def _subsets(result: Result) -> Figure:
    """The worst lead of a forbidden text in each subset, with the new expert and without."""
    rows = sorted(result.details["subsets"], key=lambda row: -row["lead"])[:40]
    figure = Figure(figsize=(9, 1 + 0.16 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for key, colour, size in (("lead_without_it", OTHERS, 4), ("lead", NEW, 5)):
        points = [(row[key], at) for at, row in enumerate(rows) if np.isfinite(row[key])]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=size)
    axes.axvline(result.bound or 0.0, color=BOUND, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [", ".join(row["experts"]) for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("nats by which a forbidden text leads, at worst", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    return figure


_DRAWN = {
    "figures": ("{}: the new expert (diamonds) and the cohort (points)", _matrices),
    "shares": ("{}: shares of tokens; the bound is dashed", _shares),
    "domains": ("{}: bits per byte", _domains),
    "subsets": ("{}: the 40 worst subsets, with it (brown) and without (grey)", _subsets),
}
