"""Answers in OpenAI's form: whole, or as server-sent events."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from flexolmo_jax.inference.mass import shares_by_name
from flexolmo_jax.serving.completions import Admission, Choice, Part, Shown, new_id, usage
from flexolmo_jax.serving.protocol import Chat, Completion

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class Words(NamedTuple):
    """The texts of single tokens, for scores."""

    tokenizer: Any

    def text(self, token: int) -> str:
        """Of an id; "token_id:7" for a part of a character, since several have the same text."""
        text = "" if self.tokenizer is None else self.tokenizer.decode([token])
        return text if text and "\ufffd" not in text else f"token_id:{token}"


class Form:
    """How one body is answered.

    Args:
      body: of the request.
      names: of the experts, for their shares.
      tokenizer: of the model; None if it has none.

    Attributes:
      id: of the answer.
    """

    def __init__(self, body: Completion | Chat, names: Sequence[str], tokenizer: Any):
        self._body, self._names, self._words = body, names, Words(tokenizer)
        self._is_chat = isinstance(body, Chat)
        self._offsets: dict[int, int] = {}
        self.id, self._created = new_id("chatcmpl" if self._is_chat else "cmpl")

    def whole(self, admission: Admission, parts: Iterable[Part]) -> dict[str, Any]:
        """The answer, once all parts are there."""
        own: dict[int, Part] = {}
        for part in parts:
            known = own.setdefault(part.index, Part(part.index, []))
            known.pieces += part.pieces
            known.ended = part.ended
        choices = []
        for choice in admission.choices:
            part = own[choice.index]
            text = {"role": "assistant", "content": part.text}
            fields = {"message": text} if self._is_chat else {"text": part.text}
            choices.append(self._choice(choice, part, fields))
        return self._answer(self._kind(is_part=False), choices, usage(admission))

    def events(self, admission: Admission, part: Part) -> Iterable[bytes]:
        """A part as server-sent events; the first of a chat's choice tells its role."""
        choice = admission.choices[part.index]
        fields: dict[str, Any] = {"text": part.text}
        if self._is_chat:
            fields = {"delta": {"content": part.text}}
            if part.index not in self._offsets:
                fields["delta"] = {"role": "assistant", **fields["delta"]}
        yield self._event([self._choice(choice, part, fields)])

    def usage_events(self, admission: Admission) -> Iterable[bytes]:
        """What comes after all parts, where it was asked for."""
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield self._event([], usage(admission))

    def trace_event(self, trace: dict[str, Any]) -> bytes:
        """The trace of an answer, after everything else."""
        return event({**self._answer(self._kind(is_part=True), [], None), "trace": trace})

    def _kind(self, is_part: bool) -> str:
        if self._is_chat:
            return "chat.completion.chunk" if is_part else "chat.completion"
        return "text_completion"

    def _event(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> bytes:
        return event(self._answer(self._kind(is_part=True), choices, used))

    def _answer(self, kind: str, choices: list[dict[str, Any]], used: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._body.model,
            "choices": choices,
            "usage": used,
        }

    def _choice(self, choice: Choice, part: Part, fields: dict[str, Any]) -> dict[str, Any]:
        made = {"index": choice.index, **fields, "logprobs": None, "finish_reason": part.ended}
        if self._body.scores is not None:
            scores = self._chat_scores if self._is_chat else self._scores
            made["logprobs"] = scores(part)
        self._offsets[part.index] = self._offsets.get(part.index, 0) + len(part.text)
        if self._body.expert_mass == "token":
            made["token_mass"] = [
                {"text": piece.text, "mass": shares_by_name(self._names, piece.shares)}
                for piece in part.pieces
                if piece.shares is not None  # not of the prompt
            ]
        if self._body.expert_mass is not None and part.ended is not None:
            made["expert_mass"] = shares_by_name(self._names, choice.shares)
        return made

    def _scores(self, part: Part) -> dict[str, Any]:
        offset = self._offsets.get(part.index, 0)
        offsets = []
        for piece in part.pieces:
            offsets.append(offset)
            offset += len(piece.text)
        return {
            "tokens": [self._words.text(piece.token) for piece in part.pieces],
            "token_logprobs": [x.scores and _number(x.scores.own) for x in part.pieces],
            "top_logprobs": [self._top(piece) for piece in part.pieces],
            "text_offset": offsets,
        }

    def _top(self, piece: Shown) -> dict[str, float] | None:
        """The likeliest tokens, and the one that is there; equal texts keep the likeliest."""
        if piece.scores is None:
            return None
        best = self._best_of(piece)
        top = {self._words.text(token): number for token, number in reversed(best)}
        top.setdefault(self._words.text(piece.token), _number(piece.scores.own))
        return dict(sorted(top.items(), key=lambda pair: -pair[1]))

    def _best_of(self, piece: Shown) -> list[tuple[int, float]]:
        assert piece.scores is not None
        pairs = zip(piece.scores.best_ids, piece.scores.best, strict=True)
        return [(int(token), _number(own)) for token, own in list(pairs)[: self._body.scores]]

    def _chat_scores(self, part: Part) -> dict[str, Any]:
        def entry(token: int, number: float) -> dict[str, Any]:
            text = self._words.text(token)
            return {"token": text, "logprob": number, "bytes": list(text.encode())}

        content = []
        for piece in part.pieces:
            assert piece.scores is not None
            own = entry(piece.token, _number(piece.scores.own))
            content.append({**own, "top_logprobs": [entry(*x) for x in self._best_of(piece)]})
        return {"content": content, "refusal": None}


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, allow_nan=False).encode() + b"\n\n"


def _number(x: Any) -> float:
    """JSON has no infinity: a token that cannot come is at the least float32."""
    return max(float(x), -3.4e38)
