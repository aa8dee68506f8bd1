"""Completions: from a checked body to requests of the engine, and from tokens to choices."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np

from flexolmo_jax.inference.engine import MAX_BIASES
from flexolmo_jax.inference.layerwise import Scores
from flexolmo_jax.inference.request import Request
from flexolmo_jax.inference.sampling import Sampling
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.serving.pieces import Piece, Pieces
from flexolmo_jax.serving.protocol import Chat, Common, Completion
from flexolmo_jax.serving.runner import Job, NewToken, Runner
from flexolmo_jax.web.errors import ApiError

SILENCE = 15.0  # seconds; proxies close connections on which nothing comes


@dataclasses.dataclass
class Part:
    """What has come of a choice since the part before.

    Attributes:
      index: of the choice.
      pieces: of its tokens; the first ones are of the prompt, with `echo`.
      ended: why it has ended, as clients are told; None: it has not.
    """

    index: int
    pieces: list["Shown"]
    ended: str | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclasses.dataclass
class Shown:
    """A token as it is shown.

    Attributes:
      text: of it; a part of a character has none.
      token: its id.
      shares: of the experts, float32 [E]; None for tokens of the prompt.
      scores: of it, if they were asked for; the first token of a prompt has none.
    """

    text: str
    token: int
    shares: np.ndarray | None
    scores: Scores | None


class Choice:
    """One continuation that a client is told of.

    Attributes:
      request: to the engine.
      generated: how many tokens it has.
      shares: sum of the experts' shares in them, float32 [E].
      job: that runs it, once it is queued.
      has_ended: its last part has been made.
    """

    def __init__(
        self,
        index: int,
        model: FlexOlmo,
        request: Request,
        stops: Sequence[str],
        echo: str | None,
    ):
        self.index, self.request = index, request
        self.generated, self.shares = 0, np.zeros(len(request.allowed))
        self.job: Job | None = None
        self.has_ended = self._has_echoed = False
        self._model, self._echo = model, echo
        self._pieces = None
        if model.tokenizer is not None:
            self._pieces = Pieces(model.tokenizer, request.prompt, stops)
        self._tokens: list[NewToken] = []

    def part(self, events: Sequence[NewToken | str], cancel: Callable[[Job, str], None]) -> Part:
        """What the engine has told since the last part; a job that a text ended is cancelled."""
        assert self.job is not None
        part = Part(self.index, [])
        if self._echo is not None and not self._has_echoed:
            self._has_echoed = True
            part.pieces += self._prompt_pieces()
        for event in events:
            if isinstance(event, str):
                part.ended = event
                part.pieces += self._shown(self._pieces.end() if self._pieces else [])
                break
            part.pieces += self._take(event)
            if self._pieces is not None and self._pieces.stopped is not None:
                part.ended = "stop"
                cancel(self.job, "stop")
                break
        self.has_ended = part.ended is not None
        return part

    def _take(self, event: NewToken) -> list[Shown]:
        self._tokens.append(event)
        self.generated += 1
        self.shares += event.shares
        if self._pieces is None:
            return [Shown("", event.token, event.shares, event.scores)]
        return self._shown(self._pieces.take(event.token))

    def _shown(self, pieces: list[Piece]) -> list[Shown]:
        own = [(piece.text, self._tokens[piece.index]) for piece in pieces]
        return [Shown(text, new.token, new.shares, new.scores) for text, new in own]

    def _prompt_pieces(self) -> list[Shown]:
        """The prompt's tokens; their texts add up to the text that was given, if one was."""
        prompt, scores = self.request.prompt, [None, *self.request.prompt_scores]
        scores += [None] * (len(prompt) - len(scores))
        texts = [""] * len(prompt)
        if self._model.tokenizer is not None:
            decoded = Pieces(self._model.tokenizer, ())
            pieces = [piece for token in prompt for piece in decoded.take(token)] + decoded.end()
            for piece in pieces:
                texts[piece.index] += piece.text
            kept = len("".join(texts))
            if self._echo and kept < len(self._echo):  # decoding leaves out a space in front
                texts[0] = self._echo[: len(self._echo) - kept] + texts[0]
        pairs = zip(texts, prompt, scores, strict=True)
        return [Shown(text, token, None, own) for text, token, own in pairs]


@dataclasses.dataclass
class Admission:
    """The choices of one body, and what it may use at most.

    Attributes:
      prompt_tokens: of all prompts; one counts once, however many choices it has.
      tokens: of all prompts and answers, at most.
      events: what the engine says of them.
    """

    choices: list[Choice]
    prompt_tokens: int
    tokens: int
    events: asyncio.Queue[tuple[Job, NewToken | str] | None] = dataclasses.field(
        default_factory=asyncio.Queue
    )

    @property
    def generated(self) -> int:
        """How many tokens the choices have."""
        return sum(choice.generated for choice in self.choices)

    def start(self, runner: Runner) -> None:
        """Queues the requests of all choices."""
        for choice in self.choices:
            choice.job = runner.start(choice.request, self.events)

    async def parts(self, runner: Runner, seconds: float) -> AsyncIterator[Part | None]:
        """The parts of all choices, as they come; None after `SILENCE` seconds without one.

        Args:
          seconds: after which they end as "timeout".
        """
        loop, choice_of = asyncio.get_running_loop(), {c.job: c for c in self.choices}
        timer = loop.call_later(seconds, self.cancel, runner, "timeout")
        silence = loop.call_later(SILENCE, self.events.put_nowait, None)
        try:
            while not all(choice.has_ended for choice in self.choices):
                told: dict[Choice, list[NewToken | str]] = {}
                for event in await self._new_events():
                    if event is None:
                        yield None
                    elif not choice_of[event[0]].has_ended:
                        told.setdefault(choice_of[event[0]], []).append(event[1])
                silence.cancel()
                silence = loop.call_later(SILENCE, self.events.put_nowait, None)
                for choice, events in told.items():
                    part = choice.part(events, runner.cancel)
                    if part.pieces or part.ended:
                        yield part
        finally:
            timer.cancel()
            silence.cancel()

    async def _new_events(self) -> list[tuple[Job, NewToken | str] | None]:
        events = [await self.events.get()]
        while not self.events.empty():
            events.append(self.events.get_nowait())
        return events

    def cancel(self, runner: Runner, reason: str = "cancelled") -> None:
        """Ends the requests that still run."""
        for choice in self.choices:
            if choice.job is not None and not choice.job.has_ended:
                runner.cancel(choice.job, reason)


def admit(
    body: Completion | Chat,
    prompts: Sequence[str | list[int]],
    model: FlexOlmo,
    mask: np.ndarray,
    length: int,
) -> Admission:
    """Makes the requests of a body.

    Args:
      prompts: texts or ids, each of which has `n` choices.
      model: which they are for.
      mask: bool [E], the experts that they may use.
      length: the most tokens of a prompt and its continuation.

    Raises:
      ApiError: 400, a parameter is impossible for this model.
    """
    count = body.n or 1
    seed = secrets.randbits(32) if body.seed is None else body.seed
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
    if stops and model.tokenizer is None:
        raise ApiError(400, "this model has no tokenizer, so it finds no texts", "stop")
    bias = _biases(body, model.config.vocab_size)
    echo = isinstance(body, Completion) and bool(body.echo)
    is_chat, scored = isinstance(body, Chat), body.scores is not None
    sampling = Sampling(
        1.0 if body.temperature is None else body.temperature, body.top_k, body.top_p
    )
    choices, prompt_tokens = [], 0
    for place, prompt in enumerate(prompts):
        plain = _request(prompt, model, "messages" if is_chat else "prompt")
        new = _new_tokens(body, len(plain.prompt), length)
        prompt_tokens += len(plain.prompt)
        for number in range(count):
            request = dataclasses.replace(
                plain, max_new_tokens=new, allowed=mask, sampling=sampling, seed=seed,
                number=place * count + number, bias=bias, scored=scored,
                scores_prompt=echo and (scored or not new),
            )  # fmt: skip
            echoed = (prompt if isinstance(prompt, str) else "") if echo else None
            choices.append(Choice(place * count + number, model, request, stops, echoed))
    most = sum(len(c.request.prompt) + c.request.max_new_tokens for c in choices)
    return Admission(choices, prompt_tokens, most)


def _request(prompt: str | list[int], model: FlexOlmo, param: str) -> Request:
    """With the ids of the prompt, and those that end a text."""
    if isinstance(prompt, str) and model.tokenizer is None:
        raise ApiError(400, "this model has no tokenizer; give token ids instead", param)
    try:
        return model.request(prompt)
    except ValueError as error:
        raise ApiError(400, str(error), param) from error


def _new_tokens(body: Completion | Chat, prompt: int, length: int) -> int:
    param = "max_tokens"
    if isinstance(body, Chat) and body.max_completion_tokens is not None:
        wanted, param = body.max_completion_tokens, "max_completion_tokens"
    elif isinstance(body, Chat):
        wanted = length - prompt if body.max_tokens is None else body.max_tokens
    else:
        wanted = 16 if body.max_tokens is None else body.max_tokens
        if wanted == 0 and not body.echo:
            raise ApiError(400, "expected at least 1 without echo, found 0", param)
    if prompt >= length + (wanted == 0):
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens; at most {length} go into prompt and answer together",
            "messages" if isinstance(body, Chat) else "prompt",
            "context_length_exceeded",
        )
    if prompt + wanted > length:
        raise ApiError(
            400,
            f"the prompt has {prompt} tokens, so at most {length - prompt} new ones are possible "
            f"({length} together); found {wanted}",
            param,
            "context_length_exceeded",
        )
    return wanted


def _biases(body: Common, vocabulary: int) -> dict[int, float]:
    biases = {}
    for name, bias in (body.logit_bias or {}).items():
        digits = name.lstrip("0") or "0"
        known = name.isascii() and name.isdigit() and len(digits) < 12
        if not known or int(digits) >= vocabulary:
            raise ApiError(
                400, f"expected token ids in [0, {vocabulary}), found {name[:40]!r}", "logit_bias"
            )
        biases[int(digits)] = bias
    if len(biases) > MAX_BIASES:
        raise ApiError(
            400, f"expected at most {MAX_BIASES} tokens, found {len(biases)}", "logit_bias"
        )
    return biases


def new_id(kind: str) -> tuple[str, int]:
    """The id of an answer, and when it was made, in seconds since 1970."""
    return f"{kind}-{secrets.token_hex(12)}", int(time.time())


def usage(admission: Admission) -> dict[str, Any]:
    """Tokens read and written."""
    return {
        "prompt_tokens": admission.prompt_tokens,
        "completion_tokens": admission.generated,
        "total_tokens": admission.prompt_tokens + admission.generated,
    }
