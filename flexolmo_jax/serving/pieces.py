"""The text of a continuation, piece by piece as its tokens come."""

import dataclasses
from collections.abc import Sequence

from flexolmo_jax.data.tokenizer import Tokenizer

CONTEXT = (
    6  # tokens that are decoded again with a new one, since decoding depends on what is before
)


@dataclasses.dataclass
class Piece:
    """The text that one token added.

    Attributes:
      text: empty for a part of a character, of which the last part has all.
      index: of the token in the continuation.
    """

    text: str
    index: int


class Pieces:
    """Decodes tokens as they come, and looks for texts that end the continuation.

    Joined, the pieces are `Tokenizer.decode_after` of all tokens, up to the first stop. What may be
    the beginning of a stop is held back until it is known.

    Args:
      before: ids of the prompt.
      stops: texts that end the continuation; none of them is part of it.

    Attributes:
      stopped: the stop that was found, or None.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(before)[-CONTEXT:]
        self._decoded = len(self._ids)  # of `_ids`; the ones before `_start` are needed no more
        self._start = 0
        self._held: list[Piece] = []
        self._count = 0
        self.stopped: str | None = None

    def take(self, token: int) -> list[Piece]:
        """Adds a token.

        Returns:
          the pieces that are now certain.
        """
        self._ids.append(token)
        self._held.append(Piece(self._new_text(), self._count))
        self._count += 1
        return self._released()

    def end(self) -> list[Piece]:
        """What is left when no more tokens come: what was held back, and a broken character."""
        if self._held and self.stopped is None:
            self._held[-1].text += self._new_text(is_last=True)
        released, rest = self._released(), self._held
        self._held = []
        return [*released, *rest]

    def _new_text(self, is_last: bool = False) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._decoded])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith("\ufffd") and not is_last):
            return ""
        self._start = max(self._start, self._decoded - CONTEXT)
        self._decoded = len(self._ids)
        return text[len(before) :]

    def _released(self) -> list[Piece]:
        text = "".join(piece.text for piece in self._held)
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, self.stopped = min(found)
            released = _cut(self._held, end)
            self._held = []
            return released
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        count, length = 0, 0
        of_whole_characters = len(self._held) - (len(self._ids) - self._decoded)
        for piece in self._held[:of_whole_characters]:
            length += len(piece.text)
            if length > len(text) - kept:
                break
            count += 1
        released, self._held = self._held[:count], self._held[count:]
        return released


def _cut(pieces: list[Piece], end: int) -> list[Piece]:
    """The pieces of the first `end` characters."""
    cut, length = [], 0
    for piece in pieces:
        if length >= end:
            break
        cut.append(Piece(piece.text[: end - length], piece.index))
        length += len(piece.text)
    return cut


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
