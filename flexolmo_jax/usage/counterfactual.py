"""The counterfactual: how much likelier an answer is with an owner's expert than without it.

For an answer of n tokens and an owner e, in bits per token:

    bits(e) = 1/n * (log2 p(answer | prompt, all experts) - log2 p(answer | prompt, all but e))

under the model's own distribution, whatever the temperature that the answer was sampled with.
"All" are those that the request might use. Above 0: the answer would have been less likely without
the owner's expert.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.request import Request


def scorings(
    prompt: Sequence[int], answer: Sequence[int], allowed: np.ndarray, mass: np.ndarray
) -> dict[int | None, Request]:
    """Requests that score an answer: as it was made, and without each expert that has mass in it.

    Args:
      prompt, answer: token ids.
      allowed: bool [E].
      mass: float [E].

    Returns:
      requests that generate nothing, by the expert that is off; None: none is. The only expert
      that is allowed cannot be off.
    """
    off = [int(e) for e in np.flatnonzero(allowed & (mass > 0)) if allowed.sum() > 1]
    text = [*prompt, *answer]
    made: dict[int | None, Request] = {None: _scoring(text, allowed)}
    for expert in off:
        mask = allowed.copy()
        mask[expert] = False
        made[expert] = _scoring(text, mask)
    return made


def _scoring(text: Sequence[int], allowed: np.ndarray) -> Request:
    return Request(text, 0, allowed, scored=True, scores_prompt=True)


def bits_per_token(scored: Mapping[int | None, Request], tokens: int) -> dict[int, float]:
    """The counterfactual by expert, from requests of `scorings` that have ended.

    Args:
      scored: the requests.
      tokens: of the answer.

    Raises:
      ValueError: a request did not end; it was cancelled.
    """
    for request in scored.values():
        if request.ended != "length":
            raise ValueError(f"expected a scored answer, found a request that is {request.ended!r}")

    def log2(request: Request) -> float:
        own = request.prompt_scores[len(request.prompt_scores) - tokens :]
        return float(sum(float(score.own) for score in own)) / math.log(2)

    whole = log2(scored[None])
    return {
        expert: (whole - log2(request)) / tokens
        for expert, request in scored.items()
        if expert is not None
    }


def counterfactual(
    engine: Engine,
    prompt: Sequence[int],
    answer: Sequence[int],
    allowed: np.ndarray,
    mass: np.ndarray,
) -> dict[int, float]:
    """The counterfactual by expert, computed at once; arguments as in `scorings`."""
    scored = scorings(prompt, answer, allowed, mass)
    for request in scored.values():
        engine.add(request)
    while engine.step():
        pass
    return bits_per_token(scored, len(answer))
