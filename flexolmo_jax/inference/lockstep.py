"""An engine that several processes run together, as on a TPU pod.

Requests come to process 0. Before each step it tells the others which have come and which were
cancelled; then all of them step. An engine does nothing by chance, so all get the same tokens.
"""

import dataclasses
import itertools
import json
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.request import Request
from flexolmo_jax.inference.sampling import Sampling

FIRST_BYTES = 1024  # of a message are sent at once; most have no more
LENGTH_BYTES = 8  # in front of them stands how many there are


class Leader:
    """The engine of process 0: used as an `Engine`; the other processes call `follow`.

    Args:
      engine: of this process. The others have made theirs with the same arguments.
    """

    _numbers = itertools.count()
    _alive: "weakref.WeakSet[Leader]" = weakref.WeakSet()

    def __init__(self, engine: Engine):
        self._engine, self._number = engine, next(self._numbers)
        self._news: list[dict[str, Any]] = []
        self._requests: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()
        self._alive.add(self)

    def check(self, request: Request) -> None:
        """As `Engine.check`."""
        self._engine.check(request)

    def add(self, request: Request) -> None:
        """As `Engine.add`."""
        self._engine.add(request)
        self._requests[request] = number = next(self._numbers)
        self._news.append({"add": number, "request": _to_json(request)})

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """As `Engine.cancel`."""
        self._engine.cancel(request, reason)
        if request in self._requests:
            self._news.append({"cancel": self._requests[request]})

    def step(self) -> bool:
        """As `Engine.step`, in all processes."""
        news, self._news = self._news, []
        # Those that are not alive any more are forgotten by the others, too.
        alive = sorted(leader._number for leader in self._alive)
        _broadcast({"step": self._number, "alive": alive, "news": news})
        return self._engine.step()


def tell_to_load() -> None:
    """Tells the other processes to make a new engine now, as this one is about to."""
    _broadcast({"load": True})


def tell_to_end() -> None:
    """Tells the other processes that there will be no more steps."""
    _broadcast({"end": True})


def follow(engine: Engine, load: Callable[[], Engine]) -> None:
    """Does what process 0 does, until it ends.

    Args:
      engine: as the first that process 0 leads.
      load: makes the next engine, when `tell_to_load` says so. If it fails with ValueError or
        OSError in this process, it has to fail in all.
    """
    engines: dict[int, Engine] = {}
    new: Engine | None = engine
    requests: dict[int, Request] = {}
    while "end" not in (message := _broadcast(None)):
        if "load" in message:
            try:
                new = load()
            except (OSError, ValueError):
                pass  # process 0 says why, and keeps what it has
            continue
        number = message["step"]
        if number not in engines:
            assert new is not None
            engines[number], new = new, None
        engines = {each: engines[each] for each in message["alive"] if each in engines}
        for each in message["news"]:
            if "add" in each:
                requests[each["add"]] = _from_json(each["request"])
                engines[number].add(requests[each["add"]])
            elif each["cancel"] in requests:
                engines[number].cancel(requests[each["cancel"]])
        engines[number].step()
        requests = {name: each for name, each in requests.items() if each.ended is None}


def _broadcast(message: dict[str, Any] | None) -> dict[str, Any]:
    """What process 0 says; every process calls this, the others with None."""
    data = b"" if message is None else json.dumps(message).encode()
    first = np.zeros(LENGTH_BYTES + FIRST_BYTES, np.uint8)
    first[:LENGTH_BYTES] = np.frombuffer(len(data).to_bytes(LENGTH_BYTES), np.uint8)
    first[LENGTH_BYTES:][: len(data)] = np.frombuffer(data[:FIRST_BYTES], np.uint8)
    first = np.asarray(multihost_utils.broadcast_one_to_all(first), np.uint8)
    length = int.from_bytes(first[:LENGTH_BYTES].tobytes())
    said = first[LENGTH_BYTES:].tobytes()[:length]
    if length > FIRST_BYTES:
        rest = np.zeros(1 << (length - 1).bit_length(), np.uint8)  # few sizes are compiled
        rest[: len(data)] = np.frombuffer(data, np.uint8)
        rest = np.asarray(multihost_utils.broadcast_one_to_all(rest), np.uint8)
        said = rest.tobytes()[:length]
    return json.loads(said)


def _to_json(request: Request) -> dict[str, Any]:
    """All that a request was made with, but for what is called with its tokens in process 0."""
    names = [field.name for field in dataclasses.fields(Request) if field.init]
    given = {name: getattr(request, name) for name in names if name != "on_token"}
    return given | {
        "prompt": list(map(int, request.prompt)),
        "allowed": np.asarray(request.allowed).tolist(),
        "bias": list(request.bias.items()),
    }


def _from_json(given: dict[str, Any]) -> Request:
    own = {
        "allowed": np.asarray(given["allowed"]),
        "sampling": Sampling(*given["sampling"]),
        "bias": dict(map(tuple, given["bias"])),
    }
    return Request(**given | own)
