"""The tables and the figure of the privacy curve, from privacy_curve_SIZE.json."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flexolmo_jax.studies.engine.report import table

Curve = Mapping[str, Any]  # privacy_curve_SIZE.json
Asked = Mapping[str, str] | None  # epsilon by owner; None is the anchor


def values(curve: Curve, asked: Asked, domain: str) -> list[float]:
    """Bits per byte on a domain, of each seed."""
    return [p["bits_per_byte"][domain] for p in curve["points"] if p["epsilon"] == asked]


def changes(curve: Curve, asked: Asked, domain: str) -> list[float]:
    """The relative change from the anchor, of each seed."""
    merged, anchor = (values(curve, one, domain) for one in (asked, None))
    return [a / b - 1 for a, b in zip(merged, anchor, strict=True)]


def cell(curve: Curve, asked: Asked, domain: str) -> str:
    """Mean over seeds, and the change from the anchor: mean, smallest and largest."""
    mean, change = statistics.mean(values(curve, asked, domain)), changes(curve, asked, domain)
    spread = f"; {min(change):+.1%} {max(change):+.1%}" if len(change) > 1 else ""
    return f"{mean:.3f} ({statistics.mean(change):+.1%}{spread})"


def row(curve: Curve, title: str, asked: Asked) -> list[str]:
    """A row of the table of all domains."""
    domains = ("public", *curve["setting"]["owners"])
    return [title, *(cell(curve, asked, domain) for domain in domains)]


def choice_words(curve: Curve) -> str:
    """How the hyperparameters were chosen."""
    setting = curve["setting"]
    if curve["tried"]:
        return (
            f"Chosen for each epsilon, among {len(setting['grid'])} settings, by the score of an "
            f"expert on {setting['tuned_on']} (unit: {setting['tuned_unit']}) alone:"
        )
    (choice,) = setting["grid"]
    return (
        f"Batch {choice['batch']}, clip norm {choice['clip']:g}, {choice['steps']} steps and "
        f"learning rate {choice['rate']:g}: steps, clip norm and rate as chosen at the other size, "
        "the batch larger as there are more documents. Nothing was tuned on this text."
    )


def tuning_table(curve: Curve) -> list[str]:
    """All choices that were tried for each epsilon, with their scores."""
    rows = []
    for tried in curve["tried"]:
        epsilon = f"{tried['epsilon']:g}"
        is_chosen = curve["chosen"][epsilon].items() <= tried.items()
        rows.append(
            [
                epsilon, tried["batch"], f"{tried['clip']:g}", tried["steps"],
                f"{tried['rate']:g}", f"{tried['bits_per_byte']:.3f}" + " (chosen)" * is_chosen,
            ]
        )  # fmt: skip
    head = ["epsilon", "batch", "clip norm", "steps", "learning rate", "bits per byte"]
    return table(head, rows, "r")


def make_part(curve: Curve, size: str, figure: str) -> list[str]:
    """The part of docs/privacy.md about one size."""
    setting, certificates = curve["setting"], curve["certificates"]
    owners, epsilons = setting["owners"], setting["epsilons"]
    head = ["", "public", *owners]
    anchor = (f"{statistics.mean(values(curve, None, domain)):.3f}" for domain in head[1:])
    together = [row(curve, f"epsilon {e}", dict.fromkeys(owners, e)) for e in epsilons]
    corpus = " --corpus CORPUS" if size == "large" else ""
    deltas = ", ".join(sorted({f"{one['delta']:.2g}" for one in certificates.values()}))
    lines = [
        f"![]({figure})",
        "",
        f"`flexolmo study privacy-curve OUT --size {size}{corpus}`, {curve['machine']}. Held-out "
        f"bits per byte (lower is better), mean of {len(setting['seeds'])} seeds, and the change "
        "from the anchor (mean; smallest and largest of the seeds). Unit: document; at most "
        f"{setting['windows']} window of a document in a step. {choice_words(curve)}",
        *(["", *tuning_table(curve)] if curve["tried"] else []),
        "",
        f"All owners ask for the same epsilon (delta {deltas}):",
        "",
        *table(head, [["anchor", *anchor], *together]),
    ]
    if len(owners) > 1:
        alone = [
            row(curve, f"{owner}: epsilon {e}", {**dict.fromkeys(owners, "none"), owner: e})
            for owner, e in itertools.product(owners, epsilons)
        ]
        lines += ["", "One owner asks for privacy, the others for none:", "", *table(head, alone)]
    return [*lines, "", units_and_noise(owners, epsilons[0], certificates)]


def units_and_noise(
    owners: Sequence[str], epsilon: str, certificates: Mapping[str, Mapping[str, Any]]
) -> str:
    """How many documents the owners have, and the noise of every private run."""
    counts = {owner: certificates[f"{owner} {epsilon}"]["units"] for owner in owners}
    units = ", ".join(f"{owner} {count:,}" for owner, count in counts.items())
    noise = ", ".join(f"{name}: {one['noise_multiplier']:g}" for name, one in certificates.items())
    return f"Documents: {units}. Noise multipliers (owner and epsilon): {noise}."


def draw(curve: Curve, figure_file: Path) -> None:
    """Draws the change in own-domain bits per byte over epsilon, one panel for each owner."""
    owners, epsilons = curve["setting"]["owners"], curve["setting"]["epsilons"]
    figure = Figure(figsize=(3.6 * len(owners), 3.2), layout="constrained")
    panels = figure.subplots(1, len(owners), squeeze=False)[0]
    for axes, owner in zip(panels, owners, strict=True):
        by_epsilon = [changes(curve, dict.fromkeys(owners, e), owner) for e in epsilons]
        for of_seed in zip(*by_epsilon, strict=True):
            axes.plot([100 * change for change in of_seed], "o-", color="C0", alpha=0.6)
        axes.axhline(0, ls="--", color="grey")
        axes.set_xticks(range(len(epsilons)), epsilons)
        axes.set(title=owner, xlabel="epsilon", ylabel="bits per byte, change in %")
    figure.suptitle("merged, against the anchor (dashed), each seed")
    figure.savefig(figure_file, dpi=130)
