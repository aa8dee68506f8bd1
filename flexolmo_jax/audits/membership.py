"""The membership audit: can the weights be asked which canaries were trained on?

Each candidate's score is how much better the audited model predicts it than the frozen anchor lets
one expect, which has seen none of them. Those that were put in and those that were left out differ
in nothing else, so that whatever tells them apart is the training. How well it does bounds epsilon
from below (Steinke et al., Privacy Auditing with One (1) Training Run, 2023).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

try:
    from jax_privacy import auditing
except ImportError as error:
    raise ValueError(
        "audits need more packages: in a clone of flexolmo_jax, run pip install -e '.[privacy]'"
    ) from error

from flexolmo_jax.audits.scoring import scores, tokenizer_of
from flexolmo_jax.audits.statistics import CONFIDENCE, Area, Rate
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.privacy.canaries import Canaries

CONTROLS = 100  # candidates that were left out; with fewer there is no headline
FALSE_ALARMS = (0.01, 0.001)  # rates at which members are counted
GUESSES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # shares of candidates guessed to be members
DELTA = 1e-5  # where there is no certificate
FEW = 4  # of a token among all candidates
CLEARLY = 0.1  # a lower bound of epsilon that is clearly above 0


class Caught(NamedTuple):
    """Members above the highest threshold that lets at most a share of non-members pass."""

    allowed: float  # share of non-members
    false_alarms: Rate  # what it comes to
    members: Rate  # with the threshold taken as given


class Membership(NamedTuple):
    """What scores tell of membership."""

    members: int
    controls: int
    area: Area
    caught: tuple[Caught, ...]
    epsilon: float  # lower bound, at 95%
    epsilon_at_most: float  # what a perfect attack on as many would have shown
    delta: float


def canary_scores(
    model: FlexOlmo,
    canaries: Canaries,
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """How many nats better each candidate is predicted than one would expect.

    What to expect of a token follows from what it is, and from how well the anchor predicts it: the
    model's log-probabilities are regressed on the anchor's, with a mean for each token of the
    vocabulary, over all candidates, without a look at the coins. What is left, summed over a
    candidate, is its score.

    Args:
      model: to audit; its public expert, alone, is the anchor.
      canaries: of the audited run.
      without, only: experts to switch off, or the only ones to use.

    Returns:
      float64 of those put in, and of those left out.
    """
    ids = canaries.ids(tokenizer_of(model))
    tokens = np.concatenate([one[1:] for one in ids])
    of = np.repeat(np.arange(len(ids)), [len(one) - 1 for one in ids])
    here = _above_expected(_logs(model, ids, without=without, only=only), tokens)
    anchor = _above_expected(_logs(model, ids, only=["public"]), tokens)
    slope = (here @ anchor) / max(anchor @ anchor, np.finfo(float).tiny)
    found = np.bincount(of, here - slope * anchor, len(ids))
    inserted = np.array([one.inserted for one in canaries.candidates])
    return found[inserted], found[~inserted]


def _logs(model: FlexOlmo, ids: list[list[int]], **experts: Any) -> np.ndarray:
    """Log-probabilities of all tokens but the first of each, one after the other: float64."""
    return np.concatenate([one.logs for one in scores(model, ids, **experts)]).astype(np.float64)


def _above_expected(logs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Less the mean over the same token; with few of it, drawn to the mean over all."""
    every = logs - logs.mean()
    sums, counts = np.bincount(tokens, every), np.bincount(tokens)
    return every - (sums / (counts + FEW))[tokens]


def membership(members: np.ndarray, controls: np.ndarray, delta: float) -> Membership:
    """What two groups of scores amount to.

    Args:
      members: of the canaries that were put in, at least one.
      controls: of those left out, at least one.
      delta: of the lower bound.

    Raises:
      ValueError: a score is not a number, or a group is empty.
    """
    if not len(members) or not len(controls):
        raise ValueError(
            f"the coins put {len(members)} canaries in and left {len(controls)} out; both are "
            "needed: train with more --canaries"
        )
    if not np.isfinite(members).all() or not np.isfinite(controls).all():
        raise ValueError("a canary's loss is not finite under this model, so it cannot be audited")
    best = np.ones(len(members)), np.zeros(len(controls))
    return Membership(
        len(members), len(controls), Area.of_scores(members, controls),
        tuple(_caught(members, controls, allowed) for allowed in FALSE_ALARMS),
        epsilon_at_least(members, controls, delta), epsilon_at_least(*best, delta), delta,
    )  # fmt: skip


def _caught(members: np.ndarray, controls: np.ndarray, allowed: float) -> Caught:
    pass_by = int(allowed * len(controls))
    threshold = np.sort(controls)[::-1][pass_by]  # the first that may not pass
    rates = (
        Rate.of_counts(int(np.sum(group > threshold)), len(group)) for group in (controls, members)
    )
    return Caught(allowed, *rates)


def epsilon_at_least(members: np.ndarray, controls: np.ndarray, delta: float) -> float:
    """A lower bound of epsilon, at 95%, from one run.

    The highest scores are guessed to be members: fixed shares of all, so that no threshold is
    chosen with a look at the coins, and each at a fifth of the 5% that may fail.
    """
    auditor = auditing.CanaryScoreAuditor(members, controls)
    everyone = np.sort(np.concatenate([members, controls]))[::-1]
    failing = (1 - CONFIDENCE) / len(GUESSES)
    found = [
        auditor.epsilon_one_run(
            failing, delta, threshold_strategy=auditing.Explicit(float(everyone[guesses - 1]))
        )
        for guesses in (max(1, round(share * len(everyone))) for share in GUESSES)
    ]
    return float(max(found))


def verdict(found: Membership, certificate: dict[str, Any] | None) -> dict[str, Any]:
    """What follows for the owner, in one word and one sentence.

    Args:
      found: of the expert alone.
      certificate: the privacy statement of the package; None where it has none.
    """
    bound, best = found.epsilon, found.epsilon_at_most
    if found.controls < CONTROLS:
        word = "no headline"
        why = f"{found.controls} controls are too few to say anything of; at least {CONTROLS}"
    elif certificate is not None and bound > certificate["epsilon"]:
        word = "refuted"
        why = (
            f"epsilon is at least {bound:.2f}, and the certificate claims {certificate['epsilon']}"
            ": the run did not do what it says"
        )
    elif certificate is not None:
        word = "not refuted"
        why = (
            f"epsilon is at least {bound:.2f}, below the certificate's {certificate['epsilon']}; "
            f"with a perfect attack, this audit could have shown {best:.2f}"
        )
    elif bound > CLEARLY:
        word = "members are told apart"
        why = f"epsilon is at least {bound:.2f}, and there is no certificate"
    else:
        word = "too weak"
        why = (
            f"epsilon is at least {bound:.2f} for a run without privacy, which is not clearly "
            "above 0: this audit would not see a leak either; use more --canaries, or more --steps"
        )
    return {"verdict": word, "why": why}
