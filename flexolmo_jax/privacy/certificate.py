"""The privacy certificate in a package's manifest, and how it is verified.

It holds everything that epsilon depends on, so anyone can recompute it. That training followed it
is the owner's word; the audits test that from outside.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from flexolmo_jax.config import PrivacyConfig
from flexolmo_jax.privacy import accounting
from flexolmo_jax.privacy.accounting import Mechanism, epsilon, pld_epsilon, renyi_epsilon

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
# Of every expert; a certificate without `parts` is older than heads, and covers these.
FIRST_PARTS = ("feed_forward", "router")
ROUNDING = 1e-6  # of epsilon: another machine may round differently
MAX_OVERCLAIM = 1.01  # ratio of claimed to recomputed epsilon; newer accountants are tighter


def make_certificate(
    privacy: PrivacyConfig,
    mechanism: Mechanism,
    delta: float,
    *,
    window_tokens: int,
    rows_clip: float | None,
    other_runs: Sequence[Mechanism],
    library: str,
    parts: Sequence[str] = FIRST_PARTS,
    optimizer: str = "adamw",
) -> dict[str, Any]:
    """The certificate, as JSON values.

    Args:
      privacy: the owner's settings.
      mechanism: of the run.
      delta: of both epsilons.
      window_tokens: S.
      rows_clip: the norm that a unit is clipped to in the release for router rows; None without it.
      other_runs: the other runs in the ledger; all protect the same unit.
      library: name and version of the package that clips, adds noise and samples.
      parts: of the expert (`Experts.parts`); one gradient of all of them is clipped and noised.
      optimizer: its name in the config; a function of the noised sums, which costs nothing.
    """
    own = epsilon([mechanism], delta)
    all_runs = epsilon([mechanism, *other_runs], delta) if other_runs else own
    return {
        "epsilon": _up(own),
        "delta": delta,
        "epsilon_of_all_runs": _up(all_runs),
        "unit": privacy.unit,
        "unit_means": UNITS[privacy.kind],
        "units": mechanism.units,
        "adjacency": ADJACENCY,
        "mechanism": "DP-SGD: Gaussian noise on sums of clipped gradients, one for each unit; then "
        f"{OPTIMIZERS[optimizer]}. {ROWS[mechanism.rows_noise_multiplier is not None]}",
        "sampling": "Poisson; batches above the largest are cut at random",
        "mean_batch": mechanism.mean_batch,
        "largest_batch": mechanism.largest_batch,
        "steps": mechanism.steps,
        "parts": list(parts),
        "clip_norm": privacy.clip,
        "noise_multiplier": mechanism.noise_multiplier,
        "rows_clip_norm": rows_clip,
        "rows_noise_multiplier": mechanism.rows_noise_multiplier,
        "windows_of_a_unit": privacy.windows,
        "window_tokens": window_tokens,
        "accountant": f"privacy loss distributions, {accounting.versions()}",
        "library": library,
        "other_runs": [{"unit": privacy.unit, **dataclasses.asdict(one)} for one in other_runs],
        "outside": list(OUTSIDE),
    }


OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}
ROWS = {
    False: "Router rows are trained in the same way.",
    True: "Router rows: one sum over all units of clipped vectors, with Gaussian noise.",
}


def verify_certificate(
    certificate: Any, where: str, gating: str | None = None, parts: Sequence[str] = FIRST_PARTS
) -> dict[str, Any]:
    """Recomputes a certificate's epsilons with both accountants.

    Each accountant proves an upper bound, so a claim holds if it is not below the smaller bound.

    Args:
      certificate: the `privacy` field of a manifest.
      where: prefix of messages.
      gating: of the same manifest: with "fixed", router rows were fitted to a release, which the
        certificate must count; None if unknown.
      parts: of the same package's expert, all of which the certificate must cover.

    Returns:
      {"epsilon": {"stated", "pld", "renyi"}, "epsilon_of_all_runs": the same, "delta": ...}; None
      for an accountant without a bound, such as Renyi's if batches may be truncated.

    Raises:
      ValueError: there is no certificate, a field is missing or impossible, it does not cover a
        part, it claims less than its own numbers cost, or they exceed the accountants' limits.
    """
    if not isinstance(certificate, dict):
        raise ValueError(f"{where}: nothing to verify, its privacy certificate is: {certificate}")
    missing = REQUIRED - certificate.keys()
    if missing:
        raise ValueError(f"{where}: the privacy certificate lacks {', '.join(sorted(missing))}")
    try:
        numbers = {name: _positive(certificate, name) for name in NUMBERS}
        _check_unit(certificate)
        mechanism = _mechanism_of(certificate)
        others = _other_runs(certificate)
        _check_rows(certificate, gating)
        _check_parts(certificate, parts)
        found = _epsilons(mechanism, others, numbers["delta"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        why = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{where}: the privacy certificate is invalid ({why})") from error
    delta = numbers["delta"]
    if not 0 < delta < 1 / mechanism.units:
        raise ValueError(
            f"{where}: delta must be in (0, 1 / {mechanism.units} units), found {delta}: above, "
            "a mechanism that publishes one unit in full would pass"
        )
    if certificate["adjacency"] != ADJACENCY:
        raise ValueError(f"{where}: expected adjacency {ADJACENCY!r}, found a different one")
    for name, (tight, loose) in found.items():
        _check_claim(f"{where}: the certificate claims {name}", numbers[name], tight, loose)
    shown = {
        name: {"stated": numbers[name], "pld": _known(tight), "renyi": _known(loose)}
        for name, (tight, loose) in found.items()
    }
    return {"delta": delta, **shown}


def _check_claim(claims: str, stated: float, tight: float, loose: float) -> None:
    """Raises ValueError if a claimed epsilon is below both bounds, or far above them."""
    least = min(tight, loose)
    if stated + ROUNDING < least:
        raise ValueError(
            f"{claims} {stated:g}, and its own numbers cost {least:.4f} (privacy loss "
            f"distributions: at most {tight:.4f}; Renyi: at most {loose:.4f})"
        )
    # Bounds of older versions exceeded `tight`.
    if stated > MAX_OVERCLAIM * max(tight, loose) + 0.01:
        raise ValueError(
            f"{claims} {stated:g}, and its own numbers cost only {tight:.4f}: they are inconsistent"
        )


def _known(bound: float) -> float | None:
    """None for infinity, which is no bound and not valid JSON."""
    return bound if math.isfinite(bound) else None


NUMBERS = ("delta", "epsilon", "epsilon_of_all_runs", "clip_norm")
FIELDS = tuple(field.name for field in dataclasses.fields(Mechanism))
REQUIRED = {
    *NUMBERS, *FIELDS, "unit", "unit_means", "adjacency", "mechanism", "rows_clip_norm",
    "windows_of_a_unit", "window_tokens", "other_runs", "accountant", "outside",
}  # fmt: skip


def _epsilons(
    mechanism: Mechanism, others: list[Mechanism], delta: float
) -> dict[str, tuple[float, float]]:
    """Bounds by privacy loss distributions, and by Renyi divergences."""

    def both(runs: list[Mechanism]) -> tuple[float, float]:
        renyi = renyi_epsilon(runs, delta)
        return pld_epsilon(runs, delta, renyi), renyi

    own = both([mechanism])
    return {
        "epsilon": own,
        "epsilon_of_all_runs": both([mechanism, *others]) if others else own,
    }


def _positive(certificate: dict[str, Any], name: str) -> float:
    value = certificate[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, found {value!r}")
    if name == "delta" and value >= 1:
        raise ValueError(f"delta must be in (0, 1), found {value!r}")
    return float(value)


def _check_unit(certificate: dict[str, Any]) -> None:
    unit = certificate["unit"]
    if not isinstance(unit, str):
        raise ValueError(f"unit must be text, found {unit!r}")
    kind, colon, field = unit.partition(":")
    if kind not in UNITS or (kind == "group") != bool(colon and field.strip()) or (
        kind != "group" and colon
    ):  # fmt: skip
        raise ValueError(f"unit must be document, sequence or group:FIELD, found {unit!r}")
    if certificate["unit_means"] != UNITS[kind]:
        raise ValueError(f"unit {unit} means {UNITS[kind]!r}, found a different meaning")
    for name in ("windows_of_a_unit", "window_tokens"):
        value = certificate[name]
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive whole number, found {value!r}")


def _check_rows(certificate: dict[str, Any], gating: str | None) -> None:
    """Checks that a release for router rows is counted if, and only if, there was one."""
    noise, clip = certificate["rows_noise_multiplier"], certificate["rows_clip_norm"]
    fitted = noise is not None
    if clip is not None:
        _positive(certificate, "rows_clip_norm")
    if fitted != (clip is not None) or not str(certificate["mechanism"]).endswith(ROWS[fitted]):
        raise ValueError("rows_noise_multiplier, rows_clip_norm and mechanism do not agree")
    if gating not in (None, "fixed", "softmax"):
        raise ValueError(f"its expert was trained with gating {gating!r}, which is unknown")
    if gating is not None and fitted != (gating == "fixed"):
        raise ValueError(
            f"rows_noise_multiplier is {noise}, and its expert was trained with gating "
            f"{gating!r}, where router rows are fitted to "
            + ("a release of their own" if gating == "fixed" else "none")
        )


def _check_parts(certificate: dict[str, Any], parts: Sequence[str]) -> None:
    covered = certificate.get("parts", list(FIRST_PARTS))
    if not isinstance(covered, list) or not all(isinstance(name, str) for name in covered):
        raise ValueError(f"parts must be a list of names, found {covered!r:.60}")
    others = [name for name in parts if name not in covered]
    if others:
        raise ValueError(
            f"it covers {', '.join(covered)}, and its expert also has {', '.join(others)}"
        )


def _other_runs(certificate: dict[str, Any]) -> list[Mechanism]:
    """The other runs. Raises ValueError if one protects another unit: their epsilons do not add."""
    listed = certificate["other_runs"]
    if not isinstance(listed, list):
        raise ValueError("other_runs must be a list")
    found = []
    for entry in listed:
        if not isinstance(entry, dict):
            raise ValueError(f"one of the other runs is not an object: {entry!r:.60}")
        if entry.get("unit") != certificate["unit"]:
            raise ValueError(
                f"one of the other runs protects the unit {entry.get('unit')!r}, and this one "
                f"{certificate['unit']!r}: their epsilons cannot be added"
            )
        found.append(Mechanism(**{k: v for k, v in entry.items() if k != "unit"}))
    return found


def _mechanism_of(certificate: dict[str, Any]) -> Mechanism:
    return Mechanism(**{name: certificate[name] for name in FIELDS})


def _up(value: float) -> float:
    return math.ceil(value * 1e4) / 1e4
