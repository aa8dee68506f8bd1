"""Figures that several studies draw."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def heat_map(
    scores: Mapping[str, Mapping[str, float]], figure_file: Path, *, baseline: str
) -> None:
    """Draws models x domains, coloured by the change from one of the models.

    Args:
      scores: scores[model][domain], lower is better.
      figure_file: a .png file to write.
      baseline: the model that the others are compared with.
    """
    models, domains = list(scores), list(scores[baseline])
    values = np.array([[scores[m][d] for d in domains] for m in models])
    change = values / values[models.index(baseline)] - 1
    label = f"bits per byte, change from {baseline}"
    change_map(models, domains, change, figure_file, label=label, values=values)


def change_map(
    rows: Sequence[str],
    columns: Sequence[str],
    change: np.ndarray,
    figure_file: Path,
    *,
    label: str,
    title: str | None = None,
    values: np.ndarray | None = None,
) -> None:
    """Draws a matrix of relative changes: red is worse, green is better.

    Args:
      rows, columns: names.
      change: float [rows, columns], 0.1 for 10% more bits per byte.
      figure_file: a .png file to write.
      label: of the colour bar.
      title: of the figure.
      values: float [rows, columns], written above the changes.
    """
    size = (2.5 + 1.05 * len(columns), 1.4 + 0.42 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(change, cmap="RdYlGn_r", vmin=-0.2, vmax=0.2, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="left")
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    for (i, j), value in np.ndenumerate(change):
        text = f"{value:+.1%}" if values is None else f"{values[i, j]:.3f}\n{value:+.1%}"
        colour = "white" if abs(value) > 0.15 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, format="{x:+.0%}", label=label)
    if title:
        figure.suptitle(title)
    figure.savefig(figure_file, dpi=130)
