"""A request to an engine: a prompt, how it is continued, and its continuation so far."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flexolmo_jax.inference.layerwise import Scores
from flexolmo_jax.inference.sampling import Sampling


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, and its continuation so far.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: the maximum number of new tokens.
      allowed: bool [E], the experts that it may use.
      stop: ids that end it; none of them is part of `generated`.
      sampling: how tokens are chosen.
      seed, number: of the random choices; requests of one seed and different numbers are
        independent.
      on_token: called with each new token, from within `Engine.step`.
      bias: what is added to the logits of tokens before one is chosen.
      scored: score the new tokens; with `scores_prompt`, those of the prompt too, and then
        `max_new_tokens` may be 0.
      generated: the new tokens.
      shares: float32 [E] for each new token: the router weights, mean over the layers, at the token
        before it.
      scores, prompt_scores: of the new tokens, and of all tokens of the prompt but the first.
      ended: why it has ended: "stop", "length", or what `Engine.cancel` says; None: it has not.

    Examples:
      >>> import flexolmo_jax as fo
      >>> model = fo.load("ours")
      >>> mask = model.allowed(1, without=["math"])[0]
      >>> tokens = []
      >>> request = fo.Request([5, 6, 7], 8, mask, on_token=tokens.append)
      >>> engine = model.engine(slots=2)
      >>> engine.add(request)
      >>> while engine.step():
      ...     pass
      >>> tokens == request.generated and request.ended
      'length'
    """

    prompt: Sequence[int]
    max_new_tokens: int
    allowed: np.ndarray
    stop: Sequence[int] = ()
    sampling: Sampling = Sampling()
    seed: int = 0
    number: int = 0
    on_token: Callable[[int], None] | None = None
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    scored: bool = False
    scores_prompt: bool = False
    generated: list[int] = dataclasses.field(default_factory=list, init=False)
    shares: list[np.ndarray] = dataclasses.field(default_factory=list, init=False)
    scores: list[Scores] = dataclasses.field(default_factory=list, init=False)
    prompt_scores: list[Scores] = dataclasses.field(default_factory=list, init=False)
    ended: str | None = dataclasses.field(default=None, init=False)

    @property
    def mass(self) -> np.ndarray:
        """The routing mass of the experts so far (mass.py), in tokens; float64 [E]."""
        return np.sum([np.zeros(len(self.allowed)), *self.shares], axis=0)

    def take(self, token: int, shares: np.ndarray, scores: Scores | None) -> None:
        """Appends a new token, or ends."""
        if token in self.stop:
            self.ended = "stop"
            return
        self.generated.append(token)
        self.shares.append(shares)
        if scores is not None:
            self.scores.append(scores)
        if len(self.generated) == self.max_new_tokens:
            self.ended = "length"
        if self.on_token is not None:
            self.on_token(token)
