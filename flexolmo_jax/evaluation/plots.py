"""Pictures of results."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def heat_map(scores: dict[str, dict[str, float]], picture: Path, *, baseline: str) -> None:
    """Draws models x domains, coloured by the change from one of the models.

    Args:
      scores: scores[model][domain], lower is better.
      picture: a .png file to write.
      baseline: the model that others are compared with.
    """
    models, domains = list(scores), list(scores[baseline])
    values = np.array([[scores[m][d] for d in domains] for m in models])
    change = values / values[models.index(baseline)] - 1
    figure = Figure(figsize=(2 + 1.1 * len(domains), 1 + 0.38 * len(models)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(change, cmap="RdYlGn_r", vmin=-0.2, vmax=0.2, aspect="auto")
    axes.set_xticks(range(len(domains)), domains)
    axes.set_yticks(range(len(models)), models)
    axes.xaxis.tick_top()
    for i in range(len(models)):
        for j in range(len(domains)):
            axes.text(
                j, i, f"{values[i, j]:.3f}\n{change[i, j]:+.1%}", ha="center", va="center",
                fontsize=7, color="white" if abs(change[i, j]) > 0.15 else "black",
            )  # fmt: skip
    figure.colorbar(image, label=f"bits per byte, change from {baseline}", format="{x:+.0%}")
    figure.savefig(picture, dpi=130)
