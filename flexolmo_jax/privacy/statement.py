"""The privacy statement of a package's manifest: the certificate, and how it is verified.

It holds all that epsilon follows from, so that anyone can compute it again. That training did what
it says is the owner's word; the audits test it from outside.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from flexolmo_jax.config import PrivacyConfig
from flexolmo_jax.privacy import accounting
from flexolmo_jax.privacy.accounting import Mechanism, epsilon, renyi_epsilon

ADJACENCY = (
    "zero-out: the text of one unit is nothing in the other data set; the number of units is public"
)
UNITS = {
    "document": "all of the text of one document",
    "sequence": "one window of tokens, NOT a document: a document of n windows is n units",
    "group": "all documents of one group",
}
OUTSIDE = (
    "the number of units, and how many windows of a unit a step may use, are public",
    "the anchor, its tokenizer and its public text are public, and were made without this text",
    "text that stands in several units is protected in each of them, not in all at once",
    "which documents are held out depends on their group or text alone; held-out documents are not "
    "trained on, and results on them, on the owner's screen, are not private",
    "the training loss, on the owner's screen and in metrics.jsonl and loss.png, is not private; "
    "they stay in the owner's run folder, as windows and checkpoints do",
    "choices that the owner made by looking at this text, such as hyperparameters tried without "
    "the ledger, are not counted",
    "noise is float32 from threefry2x32, with 64 bits of the operating system's entropy as key: "
    "attacks on the last bits of floating-point noise, or on the generator, are not covered",
    "how long training took is not covered",
)
SLACK = 1e-6  # of epsilon, for what another machine rounds differently
LOOSE = 1.01  # a claim may be so many times above what is found; newer accountants are tighter


def make_statement(
    privacy: PrivacyConfig,
    mechanism: Mechanism,
    delta: float,
    *,
    window_tokens: int,
    rows_clip: float | None,
    other_runs: Sequence[Mechanism],
    library: str,
) -> dict[str, Any]:
    """The statement, as JSON values.

    Args:
      privacy: what the owner asked for.
      mechanism: what the run does.
      delta: of both epsilons.
      window_tokens: S.
      rows_clip: the length that a unit was clipped to in the release for router rows.
      other_runs: what the ledger knows of other runs on the owner's text.
      library: the package, and version, of clipping, noise and sampling.
    """
    own, all_runs = ([mechanism], [mechanism, *other_runs])
    return {
        "epsilon": _up(epsilon(own, delta)),
        "delta": delta,
        "epsilon_of_all_runs": _up(epsilon(all_runs, delta)),
        "unit": privacy.unit,
        "unit_means": UNITS[privacy.kind],
        "units": mechanism.units,
        "adjacency": ADJACENCY,
        "mechanism": "DP-SGD: Gaussian noise on sums of clipped gradients, one for each unit; then "
        "AdamW. " + ROWS[mechanism.rows_noise_multiplier is not None],
        "sampling": "Poisson; batches above the largest are cut at random",
        "mean_batch": mechanism.mean_batch,
        "largest_batch": mechanism.largest_batch,
        "steps": mechanism.steps,
        "clip_norm": privacy.clip,
        "noise_multiplier": mechanism.noise_multiplier,
        "rows_clip_norm": rows_clip,
        "rows_noise_multiplier": mechanism.rows_noise_multiplier,
        "windows_of_a_unit": privacy.windows,
        "window_tokens": window_tokens,
        "accountant": f"privacy loss distributions, {accounting.versions()}",
        "library": library,
        "other_runs": [dataclasses.asdict(one) for one in other_runs],
        "outside": list(OUTSIDE),
    }


ROWS = {
    False: "Router rows are trained in the same way.",
    True: "Router rows: one sum over all units of clipped vectors, with Gaussian noise.",
}


def verify_statement(statement: Any, where: str) -> dict[str, Any]:
    """Computes a statement's epsilons again, by both accountants.

    Returns:
      {"epsilon": {"stated", "pld", "renyi"}, "epsilon_of_all_runs": the same, "delta": ...}.

    Raises:
      ValueError: there is none, it lacks something, or it claims less than what its own numbers
        cost.
    """
    if not isinstance(statement, dict):
        raise ValueError(f"{where}: nothing to verify, its privacy statement is: {statement}")
    try:
        mechanism = _mechanism_of(statement)
        others = [Mechanism(**one) for one in statement["other_runs"]]
        delta = float(statement["delta"])
        stated = {name: float(statement[name]) for name in ("epsilon", "epsilon_of_all_runs")}
        missing = {"unit", "adjacency", "clip_norm", "accountant", "outside"} - statement.keys()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: the privacy statement is not one ({error!r})") from error
    if missing:
        raise ValueError(f"{where}: the privacy statement lacks {', '.join(sorted(missing))}")
    if not 0 < delta < 1 / mechanism.units:
        raise ValueError(
            f"{where}: delta must be in (0, 1 / {mechanism.units} units), found {delta}: above, "
            "a mechanism that publishes one unit in full would pass"
        )
    if statement["adjacency"] != ADJACENCY:
        raise ValueError(f"{where}: expected adjacency {ADJACENCY!r}, found another")
    if not float(statement["clip_norm"]) > 0:
        raise ValueError(f"{where}: clip_norm must be positive, found {statement['clip_norm']}")
    found: dict[str, Any] = {"delta": delta}
    for name, mechanisms in (
        ("epsilon", [mechanism]),
        ("epsilon_of_all_runs", [mechanism, *others]),
    ):
        tight, loose = epsilon(mechanisms, delta), renyi_epsilon(mechanisms, delta)
        if stated[name] + SLACK < tight:
            raise ValueError(
                f"{where}: the statement claims {name} {stated[name]:g}, and its own numbers cost "
                f"{tight:.4f} (privacy loss distributions; Renyi: at most {loose:.4f})"
            )
        if stated[name] > LOOSE * tight + 0.01:
            raise ValueError(
                f"{where}: the statement claims {name} {stated[name]:g}, and its own numbers cost "
                f"only {tight:.4f}: they do not belong together"
            )
        if loose + SLACK < tight:
            raise ValueError(
                f"{where}: the accountants disagree: Renyi divergences bound {name} by "
                f"{loose:.4f}, below {tight:.4f} of privacy loss distributions"
            )
        found[name] = {"stated": stated[name], "pld": tight, "renyi": loose}
    return found


def _mechanism_of(statement: dict[str, Any]) -> Mechanism:
    fields = [field.name for field in dataclasses.fields(Mechanism)]
    return Mechanism(**{name: statement[name] for name in fields})


def _up(value: float) -> float:
    return math.ceil(value * 1e4) / 1e4
