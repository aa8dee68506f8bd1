"""The membership audit: do the weights reveal which canaries were trained on?

A candidate's score is how much better the audited model predicts it than expected from the frozen
anchor, which has seen none of the candidates. Included and held-out canaries differ in nothing
else, so only training can distinguish them. How well the scores distinguish them bounds epsilon
from below (Steinke et al., Privacy Auditing with One (1) Training Run, 2023).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

try:
    from jax_privacy import auditing
except ImportError as error:
    raise ValueError(
        "audits need more packages: in a clone of flexolmo_jax, run pip install -e '.[privacy]'"
    ) from error

from flexolmo_jax.audits.evidence import Bigrams
from flexolmo_jax.audits.scoring import scores, tokenizer_of
from flexolmo_jax.audits.statistics import CONFIDENCE, Area, Rate
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.privacy.canaries import Canaries

CONTROLS = 100  # minimum number of held-out candidates for a verdict
FALSE_ALARMS = (0.01, 0.001)  # false positive rates at which true positive rates are reported
GUESSES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # shares of candidates guessed to be members
DELTA = 1e-5  # without a certificate
# A token's mean is shrunk to the mean of all tokens as if it had this many more occurrences there.
SHRINKAGE = 4
MIN_LEAK = 0.1  # a lower bound of epsilon above it shows a leak, not noise


class Caught(NamedTuple):
    """The true positive rate at the lowest threshold with at most a given false positive rate."""

    allowed: float  # false positive rate
    false_alarms: Rate  # actual false positive rate
    members: Rate  # true positive rate, for the threshold as a constant


class Membership(NamedTuple):
    """What scores reveal about membership."""

    members: int
    controls: int
    area: Area
    caught: tuple[Caught, ...]
    epsilon: float  # lower bound, at 95%
    epsilon_at_most: float  # lower bound that a perfect attack on as many would show
    delta: float


def canary_scores(
    model: FlexOlmo,
    canaries: Canaries,
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """By how many nats each candidate is predicted better than expected.

    The expectation for a token depends on its id and on how well the anchor predicts it: the
    model's log-probabilities are regressed on the anchor's, with a mean for each token id, over all
    candidates, without use of the inclusion bits. A candidate's score is the sum of its residuals.

    Args:
      model: to audit; its public expert, alone, is the anchor.
      canaries: of the audited run.
      without, only: experts to switch off, or the only experts to use.

    Returns:
      float64 scores of the included, and of the held-out candidates.
    """
    ids = canaries.ids(tokenizer_of(model))
    audited = _logs(model, ids, without=without, only=only)
    return _scores_of(canaries, ids, audited, _logs(model, ids, only=["public"]))


def evidence_scores(bigrams: Bigrams, canaries: Canaries) -> tuple[np.ndarray, np.ndarray]:
    """As `canary_scores`, of an evidence head alone; the public evidence head is the anchor."""
    ids = canaries.ids(tokenizer_of(bigrams.model))
    return _scores_of(canaries, ids, *bigrams.logs(ids))


def _scores_of(
    canaries: Canaries, ids: list[list[int]], audited: np.ndarray, anchor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The scores, from log-probabilities of all tokens but each candidate's first, end to end."""
    tokens = np.concatenate([sequence[1:] for sequence in ids])
    candidate = np.repeat(np.arange(len(ids)), [len(sequence) - 1 for sequence in ids])
    audited, anchor = _above_expected(audited, tokens), _above_expected(anchor, tokens)
    slope = (audited @ anchor) / max(anchor @ anchor, np.finfo(float).tiny)
    residuals = np.bincount(candidate, audited - slope * anchor, len(ids))
    inserted = np.array([canary.inserted for canary in canaries.candidates])
    return residuals[inserted], residuals[~inserted]


def _logs(model: FlexOlmo, ids: list[list[int]], **experts: Any) -> np.ndarray:
    """Log-probabilities of all tokens but each sequence's first, concatenated: float64."""
    return np.concatenate([s.logs for s in scores(model, ids, **experts)]).astype(np.float64)


def _above_expected(logs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities minus the shrunk mean over occurrences of the same token."""
    every = logs - logs.mean()
    sums, counts = np.bincount(tokens, every), np.bincount(tokens)
    return every - (sums / (counts + SHRINKAGE))[tokens]


def membership(
    members: np.ndarray, controls: np.ndarray, delta: float, attacks: int = 1
) -> Membership:
    """The membership report of two groups of scores.

    Args:
      members: scores of the included canaries, at least one.
      controls: scores of the held-out canaries, at least one.
      delta: of the lower bound.
      attacks: the number of scores of which the largest lower bound is used (`verdict`).

    Raises:
      ValueError: a score is not finite, or a group is empty.
    """
    if not len(members) or not len(controls):
        raise ValueError(
            f"{len(members)} canaries are included and {len(controls)} held out; both are needed: "
            "train with more --canaries"
        )
    if not np.isfinite(members).all() or not np.isfinite(controls).all():
        raise ValueError("a canary's loss is not finite under this model, so it cannot be audited")
    best = np.ones(len(members)), np.zeros(len(controls))
    return Membership(
        len(members), len(controls), Area.of_scores(members, controls),
        tuple(_at_false_positive_rate(members, controls, allowed) for allowed in FALSE_ALARMS),
        epsilon_at_least(members, controls, delta, attacks),
        epsilon_at_least(*best, delta, attacks), delta,
    )  # fmt: skip


def _at_false_positive_rate(members: np.ndarray, controls: np.ndarray, allowed: float) -> Caught:
    false_positives = int(allowed * len(controls))
    threshold = np.sort(controls)[::-1][false_positives]  # the highest score that must not exceed
    rates = (
        Rate.of_counts(int(np.sum(group > threshold)), len(group)) for group in (controls, members)
    )
    return Caught(allowed, *rates)


def epsilon_at_least(
    members: np.ndarray, controls: np.ndarray, delta: float, attacks: int = 1
) -> float:
    """A lower bound of epsilon, at 95% confidence, from one run.

    The highest scores are guessed to be members. Their numbers are fixed shares of all candidates,
    so no threshold depends on the inclusion bits, and each has a fifth of the 5% error, which
    `attacks` share.
    """
    auditor = auditing.CanaryScoreAuditor(members, controls)
    everyone = np.sort(np.concatenate([members, controls]))[::-1]
    failing = (1 - CONFIDENCE) / len(GUESSES) / attacks
    found = [
        auditor.epsilon_one_run(
            failing, delta, threshold_strategy=auditing.Explicit(float(everyone[guesses - 1]))
        )
        for guesses in (max(1, round(share * len(everyone))) for share in GUESSES)
    ]
    return float(max(found))


def verdict(
    attacks: Mapping[str, Membership], certificate: dict[str, Any] | None
) -> dict[str, Any]:
    """The conclusion for the owner: a verdict and a sentence that explains it.

    Args:
      attacks: the reports on what is in the package, by title: the expert alone, and its evidence
        head alone. What any of them shows, the package reveals.
      certificate: of the package; None without one.
    """
    title, found = max(attacks.items(), key=lambda item: item[1].epsilon)
    bound, best = found.epsilon, found.epsilon_at_most
    least = f"epsilon is at least {bound:.2f}"
    if len(attacks) > 1 and bound > 0:
        least += f", by {title}"
    if found.controls < CONTROLS:
        word = "no headline"
        why = f"{found.controls} controls are too few for a verdict; it takes at least {CONTROLS}"
    elif certificate is not None and bound > certificate["epsilon"]:
        word = "refuted"
        why = (
            f"{least}, and the certificate claims {certificate['epsilon']}"
            ": the run did not follow it"
        )
    elif certificate is not None:
        word = "not refuted"
        why = (
            f"{least}, below the certificate's {certificate['epsilon']}; "
            f"with a perfect attack, this audit could have shown {best:.2f}"
        )
    elif bound > MIN_LEAK:
        word = "members are distinguished"
        why = f"{least}, and there is no certificate"
    else:
        word = "too weak"
        why = (
            f"{least} for a run without privacy, which is not clearly "
            "above 0: this audit would not see a leak either; use more --canaries, or more --steps"
        )
    return {"verdict": word, "why": why}
