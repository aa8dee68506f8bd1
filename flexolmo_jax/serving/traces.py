"""Traces of answers: which owners are asked where the words of an answer stand.

Only what the model said here can be traced, for a while after it was said: whoever could ask about
any text could ask whether a document of his is in an owner's index. An owner is asked once about an
answer, and what it said is kept: whoever asks again and again uses up nobody's budget.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from flexolmo_jax.serving.keys import Policy
from flexolmo_jax.tracing.service.answers import Said
from flexolmo_jax.tracing.service.ask import ask
from flexolmo_jax.tracing.service.owners import Owners, read_owners
from flexolmo_jax.web.errors import ApiError
from flexolmo_jax.web.followed import Followed

KEPT = 1000  # answers
BYTES = 1 << 26  # of all that owners said of them; a stranger may say much
SECONDS = 600.0
log = logging.getLogger("flexolmo_jax.serving")


@dataclasses.dataclass
class Given:
    """An answer that was given.

    Attributes:
      key: the name of the policy whose key has it.
      prompt, text: what was asked, and what the model said.
      experts: that might take part in it.
      until: when it is forgotten, of `time.monotonic`.
      said: what owners said of it, by their names.
      size: of what they said, in bytes of JSON.
      asking: held while owners are asked, so that each is asked once.
    """

    key: str
    prompt: str
    text: str
    experts: tuple[str, ...]
    until: float
    said: dict[str, Said] = dataclasses.field(default_factory=dict)
    size: int = 0
    asking: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class Traces:
    """The answers of late, and the owners that may be asked about them.

    Args:
      file: of owners (`read_owners`); it is followed.

    Raises:
      ValueError: it is missing or damaged.
    """

    def __init__(self, file: Path):
        self._owners: Followed[Owners] = Followed(file, lambda: read_owners(file))
        self._owners.current()
        self._given: collections.OrderedDict[str, Given] = collections.OrderedDict()

    def names(self, experts: Collection[str]) -> list[str]:
        """Which of these experts have an owner that can be asked."""
        with contextlib.suppress(ApiError):
            return [address.name for address in self._read().of(experts)]
        return []

    def keep(
        self, number: str, policy: Policy, prompt: str, text: str, experts: Collection[str]
    ) -> None:
        """Keeps an answer for as long as it may be traced.

        Args:
          number: its id.
          policy: of the key that has it.
          prompt: what was asked; passages are ranked by it, and no owner is told of it.
          experts: that might take part in it.
        """
        now = time.monotonic()
        self._given[number] = Given(policy.name, prompt, text, tuple(experts), now + SECONDS)
        while len(self._given) > KEPT or next(iter(self._given.values())).until < now:
            self._given.popitem(last=False)

    async def trace(
        self, number: str, policy: Policy, permitted: Collection[str]
    ) -> dict[str, Any]:
        """Asks the owners of the experts that an answer might use, and of no others.

        Args:
          number: of the answer.
          policy: of the key that asks.
          permitted: the experts that this key may use now.

        Raises:
          ApiError: 404, there is no such answer, or another key has it; 503, the file of owners
            cannot be read.
        """
        given = self._given.get(number)
        if given is None or given.key != policy.name or given.until < time.monotonic():
            raise ApiError(
                404,
                f"no answer {number!r}; answers can be traced for {SECONDS / 60:.0f} minutes",
                "id",
                "answer_not_found",
            )
        owners = self._read()
        asked = owners.of([name for name in given.experts if name in permitted])
        async with given.asking:
            found = await ask(
                given.text, asked, prompt=given.prompt, seconds=owners.seconds, said=given.said
            )
        made = found.to_json()
        given.size = len(await asyncio.to_thread(json.dumps, made))
        while sum(one.size for one in self._given.values()) > BYTES:
            self._given.popitem(last=False)
        return made

    def _read(self) -> Owners:
        try:
            return self._owners.current()
        except (OSError, ValueError) as error:
            log.error("no owner is asked: %s", error)
            raise ApiError(
                503, "the file of owners cannot be read; see the server's log", code="owners"
            ) from error
