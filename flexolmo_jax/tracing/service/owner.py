"""The state of an owner's service, and how it answers one question."""

import asyncio
import concurrent.futures
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, TypeVar

from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.service.askers import ANYBODY, KEYS, Asker
from flexolmo_jax.tracing.service.disclosure import Disclosed, TooSlow, disclose
from flexolmo_jax.tracing.service.policy import Policy, read_policy
from flexolmo_jax.tracing.service.revealed import Revealed
from flexolmo_jax.web.errors import ApiError
from flexolmo_jax.web.followed import Followed
from flexolmo_jax.web.keys import Meter, holder_of

WAITING = 32  # questions that may wait for one that is searched
INDEX = "index.json"
Value = TypeVar("Value")
log = logging.getLogger("flexolmo_jax.tracing")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an owner serves.

    Attributes:
      index: its folder.
      policy: a file.
      keys: a file; None: anybody may ask.
      log: a file; None: nothing is written down.
    """

    index: Path
    policy: Path
    keys: Path | None = None
    log: Path | None = None


class Owner:
    """An owner's service.

    Index, policy and keys are followed: an answer that leaves is one of the files that are there
    then. While one of them cannot be read, nothing is said.

    Args:
      settings: which files.

    Raises:
      ValueError: one of them is missing or damaged.

    Attributes:
      revealed: what was said, to whom.
      is_draining: no new questions are taken.
    """

    def __init__(self, settings: Settings):
        self.is_draining, self.revealed = False, Revealed(settings.log)
        self._policy = Followed(settings.policy, lambda: read_policy(settings.policy))
        self._index = Followed(settings.index / INDEX, lambda: Index.open(settings.index))
        self._keys: Followed[dict[str, Asker]] | None = None
        if (keys := settings.keys) is not None:
            self._keys = Followed(keys, lambda: {x.sha256: x for x in KEYS.read(keys)})
            self._keys.current()
        self.policy, self.index = self._policy.current(), self._index.current()
        # One thread: so what was used is counted before the next question is looked at.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="search")
        self._waiting, self._meters = 0, dict[str, Meter]()

    def asker(self, authorization: str | None) -> Asker:
        """Who asks. Raises ApiError, 401, if nobody known."""
        if self._keys is None:
            return ANYBODY
        known = _read(self._keys, "keys")
        return holder_of(authorization, known)

    async def answer(self, asker: Asker, text: str) -> dict[str, Any]:
        """What may be said of a text.

        Raises:
          ApiError: 400 it is too long; 403 nothing may be said; 429 the asker's limits are reached;
            503 there is no room, a search took too long, or a file cannot be read.
        """
        if self.is_draining:
            raise ApiError(503, "the service is shutting down", code="shutdown")
        policy = _read(self._policy, "policy")
        _check(policy, text)
        self._check_rate(policy, asker)
        if self._waiting >= WAITING:
            raise ApiError(
                503, "too many questions wait; ask later", code="overloaded",
                headers={"Retry-After": "5"},
            )  # fmt: skip
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._search, asker, text)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Ends the thread, after what it is doing."""
        self._thread.shutdown(cancel_futures=True)

    def _check_rate(self, policy: Policy, asker: Asker) -> None:
        meter = self._meters.setdefault(asker.name, Meter())
        wait = meter.seconds_until(1, policy.requests_per_minute)
        if wait > 0:
            raise ApiError(
                429,
                f"expected at most {policy.requests_per_minute} questions a minute",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(int(wait) + 1)},
            )
        meter.begin(1)
        meter.end(1, used=1)

    def _search(self, asker: Asker, text: str) -> dict[str, Any]:
        """Searches again where something changed meanwhile, so that nothing withdrawn is said."""
        for _ in range(5):
            index = _read(self._index, "index")
            policy = _read(self._policy, "policy")
            _check(policy, text)
            tokens = len(index.encode(text)[0])
            left = self._left(policy, asker, tokens)
            try:
                disclosed = disclose(index, text, policy, left)
            except TooSlow:  # it is counted all the same: it took as long as others
                self._write_down(policy, asker, text, Disclosed(tokens, (), 0))
                raise ApiError(
                    503, f"the search took more than {policy.seconds} s; ask about less text",
                    code="too_slow",
                ) from None  # fmt: skip
            if self._keys is not None and asker not in _read(self._keys, "keys").values():
                raise ApiError(401, "the key was removed", code="invalid_api_key")
            if self._index.is_current(index) and self._policy.is_current(policy):
                return self._said(index, policy, asker, text, disclosed)
        raise ApiError(503, "the index keeps changing; ask later", code="changing")

    def _left(self, policy: Policy, asker: Asker, tokens: int) -> int:
        """The characters that may still be shown today; ApiError if the tokens are too many."""
        used = self.revealed.used(asker.name)
        if used.tokens + tokens > policy.tokens_per_day:
            now = time.time()
            raise ApiError(
                429,
                f"expected at most {policy.tokens_per_day} tokens of text a day (UTC), of which "
                f"{max(0, policy.tokens_per_day - used.tokens)} are left; found {tokens}",
                code="budget",
                headers={"Retry-After": str(int(86400 - now % 86400) + 1)},
            )
        return max(0, policy.characters_per_day - used.characters)

    def _said(
        self, index: Index, policy: Policy, asker: Asker, text: str, disclosed: Disclosed
    ) -> dict[str, Any]:
        receipt = self._write_down(policy, asker, text, disclosed)
        spans = []
        for span in disclosed.spans:
            passages = [_shown(passage._asdict()) for passage in span.passages]
            fields = {**span._asdict(), "count": sum(span.counts.values()), "passages": passages}
            del fields["counts"]
            spans.append(fields)
        return {
            "owner": index.owner,
            "level": policy.level,
            "tokens": disclosed.tokens,
            "spans": spans,
            "receipt": receipt,
        }

    def _write_down(
        self, policy: Policy, asker: Asker, text: str, disclosed: Disclosed
    ) -> str | None:
        try:
            return self.revealed.add(asker.name, text, policy, disclosed)
        except (OSError, ValueError) as error:
            log.error("nothing is said, since the log cannot be written: %s", error)
            raise ApiError(503, "the log cannot be written", code="log") from error


def _shown(fields: dict[str, Any]) -> dict[str, Any]:
    """A passage as it is sent: the asker knows whom it asked for what, and ranks them itself."""
    return {name: x for name, x in fields.items() if name not in ("owner", "match", "score")}


def _check(policy: Policy, text: str) -> None:
    if policy.level == "off":
        raise ApiError(403, "this owner answers no traces", code="off")
    if len(text) > policy.maximum_characters:
        raise ApiError(
            400,
            f"expected at most {policy.maximum_characters} characters, found {len(text)}",
            "text",
        )


def _read(followed: Followed[Value], what: str) -> Value:
    try:
        return followed.current()
    except (ValueError, OSError) as error:
        log.error("nothing is said, since the %s cannot be read: %s", what, error)
        raise ApiError(503, f"the owner's {what} cannot be read", code="damaged") from error
