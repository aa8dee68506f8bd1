"""The figures of a study's report, beside those of `engine/plots.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def routing_map(
    shares: Mapping[str, np.ndarray], experts: Sequence[str], figure_file: Path, *, title: str
) -> None:
    """Draws the weight of each expert on each domain's text, layer by layer.

    Args:
      shares: by domain: float [L, E], each layer's summing to 1.
      experts: names.
      figure_file: a .png file to write.
    """
    domains = list(shares)
    layers = len(next(iter(shares.values())))
    width = 0.55 * len(experts) + 0.6
    figure = Figure(figsize=(2 + layers * width, 1.9 + 0.42 * len(domains)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, layers, sharey=True))
    for layer, axes in enumerate(panels):
        values = np.stack([shares[domain][layer] for domain in domains])
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_xticks(range(len(experts)), experts, rotation=60, ha="right")
        axes.set_yticks(range(len(domains)), domains)
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if value > 0.6 else "black"
            axes.text(
                j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour
            )
    panels[0].set_ylabel("text of")
    figure.supxlabel("expert", fontsize=10)
    figure.colorbar(image, ax=list(panels), format="{x:.0%}")
    figure.suptitle(title)
    figure.savefig(figure_file, dpi=130)


Curve = Sequence[tuple[float, float]]  # mean, half of the error bar


def curves(
    ticks: Sequence[str],
    lines: Mapping[str, Curve],
    figure_file: Path,
    *,
    title: str,
    labels: tuple[str, str],
    level: Mapping[str, float],
    shares: bool = False,
) -> None:
    """Bits per byte, or their change, over something that was varied.

    Args:
      ticks: labels of the values that were varied.
      lines: by name: a mean and an error for each tick.
      figure_file: a .png file to write.
      title: of the figure.
      labels: of its x and y axes.
      level: values to compare with, by name; drawn as dashed lines.
      shares: show the values as percentages.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, line) in enumerate(lines.items()):
        mean, error = np.asarray(line, float).T
        axes.errorbar(
            range(len(mean)),
            mean,
            error,
            label=name,
            marker="o",
            capsize=3,
            color=f"C{number % 10}",
        )
    for number, (name, value) in enumerate(level.items()):
        axes.axhline(value, ls=("--", ":", "-.")[number % 3], color="grey", label=name)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
    if shares:
        axes.yaxis.set_major_formatter("{x:+.0%}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(figure_file, dpi=130)
