"""The engine in a thread of its own: requests come from an event loop, and tokens go back to it.

A model can be replaced while it runs: new requests go to the new one, those in flight end on the
old one, which is then dropped. An expert is withdrawn at once, before any file is read: requests
that may use it end, and no later request may.
"""

import asyncio
import concurrent.futures
import dataclasses
import logging
import threading
from collections.abc import Callable, Collection

import jax
import numpy as np

from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.layerwise import Scores
from flexolmo_jax.inference.lockstep import Leader, tell_to_end, tell_to_load
from flexolmo_jax.inference.request import Request
from flexolmo_jax.model import FlexOlmo

PREFIXES = 4  # read prompts that are kept, for requests that begin alike with the same experts
HEARTBEAT = 1.0  # seconds after which the other processes hear that there is nothing to do
log = logging.getLogger("flexolmo_jax.serving")


@dataclasses.dataclass
class NewToken:
    """A token of a continuation, as it is told to the event loop."""

    token: int
    shares: np.ndarray  # of the experts, float32 [E]
    scores: Scores | None


@dataclasses.dataclass(eq=False)
class Job:
    """A request that runs, and what has come of it.

    Attributes:
      events: gets the job with each `NewToken`; then with a str, why it has ended: what
        `Request.ended` says, or "error".
    """

    request: Request
    engine: Engine | Leader
    model: FlexOlmo  # whose experts `request.allowed` is about
    events: asyncio.Queue
    has_ended: bool = False
    told: int = 0  # tokens


class Runner:
    """Runs requests.

    Args:
      model: that requests are for; where several processes hold it, this is process 0.
      slots: how many requests run at a time.
      length: the most tokens of a prompt and its continuation.

    Attributes:
      slots, length: as given.
      count: how many requests run or wait.
      is_broken: a step failed, and no new engine could be made.
    """

    def __init__(self, model: FlexOlmo, slots: int, length: int):
        if length < 2:
            raise ValueError(f"a prompt and its answer need at least 2 tokens, found {length}")
        self.length, self.count, self.is_broken = length, 0, False
        self.slots, self._leads = slots, jax.process_count() > 1
        self._current = (model, self._new_engine(model))  # as one, for the other thread
        self._jobs: list[Job] = []
        self._commands: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def open(self) -> None:
        """Begins, for the event loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def model(self) -> FlexOlmo:
        """That new requests are for."""
        return self._current[0]

    def start(self, request: Request, events: asyncio.Queue) -> Job:
        """Queues a request, which is told to `events`.

        Raises:
          ValueError: the engine cannot run it.
        """
        model, engine = self._current
        engine.check(request)
        job = Job(request, engine, model, events)
        self.count += 1
        self._do(lambda: self._add(job))
        return job

    def cancel(self, job: Job, reason: str = "cancelled") -> None:
        """Ends a request; its slot is free from the next step on."""
        self._do(lambda: job.engine.cancel(job.request, reason))

    def withdraw(self, off: Callable[[FlexOlmo], Collection[str]]) -> None:
        """Ends the requests that may use certain experts, as "expert_withdrawn".

        Args:
          off: the names of these experts, of a model in use: of one that was replaced, too.
        """

        def end() -> None:
            models = {id(job.model): job.model for job in self._jobs}
            names = {own: list(off(model)) for own, model in models.items()}
            for job in self._jobs:
                is_off = np.isin(job.model.expert_names, names[id(job.model)])
                if np.any(job.request.allowed & is_off):
                    job.engine.cancel(job.request, "expert_withdrawn")

        self._do(end)

    async def replace(self, load: Callable[[], FlexOlmo]) -> FlexOlmo:
        """Gives later requests another model; those in flight end on theirs.

        Args:
          load: reads the model, in another thread. Several processes do it together, between two
            steps, so that requests wait for it.

        Raises:
          ValueError, OSError: of `load`; requests still go to the model of before.
        """
        if not self._leads:
            model = await asyncio.to_thread(load)
            engine = await asyncio.to_thread(self._new_engine, model)
        else:
            made: concurrent.futures.Future = concurrent.futures.Future()
            self._do(lambda: self._load_together(load, made))
            model, engine = await asyncio.wrap_future(made)
        with self._changed:
            self._current = (model, engine)
        return model

    def _load_together(self, load: Callable[[], FlexOlmo], made: concurrent.futures.Future) -> None:
        tell_to_load()
        try:
            model = load()
            made.set_result((model, self._new_engine(model)))
        except Exception as error:
            made.set_exception(error)

    def _new_engine(self, model: FlexOlmo) -> Engine | Leader:
        engine = new_engine(model, self.slots, self.length)
        return Leader(engine) if self._leads else engine

    async def close(self, reason: str = "shutdown") -> None:
        """Ends all requests, and the thread."""

        def end() -> None:
            for job in self._jobs:
                job.engine.cancel(job.request, reason)
            self._is_closed = True

        self._do(end)
        await asyncio.to_thread(self._thread.join)

    def _do(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _add(self, job: Job) -> None:
        self._jobs.append(job)
        job.engine.add(job.request)

    def _run(self) -> None:
        while not self._is_closed:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._commands or self._jobs, HEARTBEAT if self._leads else None
                )
            self._turn()
        if self._leads:
            tell_to_end()

    def _turn(self) -> None:
        """One step of all engines; what it knows of a replaced model ends with it."""
        with self._changed:
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        engines = {id(job.engine): job.engine for job in self._jobs}
        if self._leads and not engines and not self._is_closed:
            engines[0] = self._current[1]  # its heartbeat
        for engine in engines.values():
            self._step(engine)
        self._tell()

    def _step(self, engine: Engine | Leader) -> None:
        try:
            engine.step()
        except Exception:  # whatever it is, clients must be told, and later requests are answered
            log.exception("a step of the engine failed; its requests end, and a new engine begins")
            for job in self._jobs:
                if job.engine is engine:
                    engine.cancel(job.request, "error")
            self._renew(engine)

    def _renew(self, engine: Engine | Leader) -> None:
        """Makes a new engine in place of one that failed, unless that was replaced already."""
        model, current = self._current
        if current is not engine:
            return
        if self._leads:  # the others may have come further
            self.is_broken = True
            return
        try:
            renewed = self._new_engine(model)
        except Exception:  # the process cannot work any more; whoever watches its health ends it
            self.is_broken = True
            log.exception("no new engine could be made")
            return
        with self._changed:
            if self._current[1] is engine:
                self._current = (model, renewed)
        self.is_broken = False

    def _tell(self) -> None:
        """Hands what is new to the event loop, all at once."""
        told: list[tuple[Job, NewToken | str]] = []
        for job in self._jobs:
            request = job.request
            for at in range(job.told, len(request.generated)):
                scores = request.scores[at] if request.scored else None
                told.append((job, NewToken(request.generated[at], request.shares[at], scores)))
            job.told = len(request.generated)
            if request.ended is not None:
                job.has_ended = True
                told.append((job, request.ended))
        self._jobs = [job for job in self._jobs if not job.has_ended]
        if told and self._loop is not None:
            self._loop.call_soon_threadsafe(self._put, told)

    def _put(self, told: list[tuple[Job, NewToken | str]]) -> None:
        for job, event in told:
            self.count -= isinstance(event, str)
            job.events.put_nowait((job, event))


def new_engine(model: FlexOlmo, slots: int, length: int) -> Engine:
    """An engine whose programs are compiled; that takes seconds.

    Several processes that hold a model together make it together.
    """
    engine = model.engine(slots, length, PREFIXES)
    engine.compile()
    return engine
