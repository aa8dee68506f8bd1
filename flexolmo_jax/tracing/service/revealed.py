"""What was revealed, to whom: an append-only log, and the daily budgets counted from it."""

import contextlib
import datetime
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.storage import hash_chain
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.tracing.results import Span
from flexolmo_jax.tracing.service.disclosure import Disclosed
from flexolmo_jax.tracing.service.policy import Policy


class Used(NamedTuple):
    """What an asker has used on a day.

    Attributes:
      requests: that were answered.
      tokens: of the texts asked about.
      spans: that were said.
      characters: of documents, that were shown.
    """

    requests: int = 0
    tokens: int = 0
    spans: int = 0
    characters: int = 0

    def plus(self, *more: int) -> "Used":
        """With more of each field."""
        return Used(*(a + b for a, b in zip(self, more, strict=True)))


class Revealed:
    """The log of one service, and what each asker has used today.

    Args:
      file: the log; None: nothing is kept, and budgets begin with the process. What a crash left
        of its last line is cut off.

    Raises:
      ValueError: the log is damaged; the text names the line.
    """

    def __init__(self, file: Path | None):
        self._file = file
        self._today = today()
        self._used: dict[str, Used] = defaultdict(Used)
        if file is not None and file.exists():
            hash_chain.mend(file)
            for (day, asker), used in usage(hash_chain.read(file)).items():
                if day == self._today:
                    self._used[asker] = used

    def used(self, asker: str) -> Used:
        """What an asker has used today."""
        if self._today != today():
            self._today = today()
            self._used.clear()
        return self._used[asker]

    def add(self, asker: str, text: str, policy: Policy, disclosed: Disclosed) -> str | None:
        """Writes down an answer, before it is given.

        Returns:
          the digest of its line, which vouches for all lines before it; None without a log.

        Raises:
          ValueError, OSError: it cannot be written; then nothing may be said.
        """
        digest = None
        if self._file is not None:
            line = _line(asker, text, policy, disclosed)
            digest = hash_chain.append(self._file, [line])
        self._used[asker] = self.used(asker).plus(
            1, disclosed.tokens, len(disclosed.spans), disclosed.characters
        )
        return digest

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other services off the log while the body runs: each would count on its own.

        Raises:
          ValueError: another process holds it.
        """
        if self._file is None:
            yield
            return
        lock = self._file.with_name(f".{self._file.name}.serving.lock")
        with locked(lock, "answers with this log", "stop it, or give each service its own --log"):
            yield


def _line(asker: str, text: str, policy: Policy, disclosed: Disclosed) -> dict[str, Any]:
    about = {"text": text} if policy.keep_texts else {}
    return {
        "asker": asker,
        "level": policy.level,
        "text_sha256": _digest(text),
        **about,
        "tokens": disclosed.tokens,
        "characters": disclosed.characters,
        "spans": [_said(text, span) for span in disclosed.spans],
    }


def _said(text: str, span: Span) -> dict[str, Any]:
    shown = {
        passage.document: len(passage.before) + len(passage.after) for passage in span.passages
    }
    return {
        "span_sha256": _digest(text[span.start : span.stop]),
        "tokens": span.tokens,
        "count": sum(span.counts.values()),
        "documents": shown,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def usage(records: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Used]:
    """What was revealed, by day and asker.

    Args:
      records: of a log, as `hash_chain.read` yields them.

    Raises:
      ValueError: a record is none of such a log, or the chain is broken.
    """
    found: dict[tuple[str, str], Used] = defaultdict(Used)
    for record in records:
        try:
            own = (1, record["tokens"], len(record["spans"]), record["characters"])
            key = record["time"][:10], record["asker"]
            if not all(type(x) is int for x in own):
                raise TypeError("a count is no whole number")
            found[key] = found[key].plus(*own)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"line {record['number']}: not of a log of `flexolmo trace serve` ({error!r})"
            ) from error
    return dict(found)


def today() -> str:
    """The day in UTC, as in the log."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
