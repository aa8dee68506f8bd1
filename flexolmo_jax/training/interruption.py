"""Stopping a run from outside: SIGINT and SIGTERM save the state first."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from flexolmo_jax.runtime import startup


class Interruption:
    """Says after each step whether to save and stop, because SIGINT or SIGTERM came.

    With several processes, the one that gets the signal (a pod that is preempted sends SIGTERM)
    informs the others, and all stop after the same step.

    Attributes:
      by_user: whether the signal was SIGINT.
    """

    def __init__(self) -> None:
        self.by_user = False
        self._caught = False
        self._distributed = jax.process_count() > 1  # JAX handles SIGTERM, for all

    def requested(self, step: int) -> bool:
        """Whether to stop after this step."""
        if not self._distributed:
            return self._caught
        if self._caught:
            self._caught = False
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def watched(self) -> Iterator["Interruption"]:
        """Catches the signals while the body runs."""
        old = {}
        for number in (signal.SIGINT,) if self._distributed else (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: no handlers there
                old[number] = signal.signal(number, self._catch)
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _catch(self, number: int, _: Any) -> None:
        self._caught = True
        if number == signal.SIGINT:
            self.by_user = True
            signal.signal(signal.SIGINT, startup.second_interrupt)
            # os.write: a handler may run while the console holds its lock.
            os.write(2, b"flexolmo: saving after this step; Ctrl-C again ends at once\n")
