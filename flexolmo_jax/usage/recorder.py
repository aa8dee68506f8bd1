"""Writes a usage ledger from a thread of its own, so that nobody waits for the disk."""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from flexolmo_jax.usage.entries import check
from flexolmo_jax.usage.ledger import Ledger

WRITE_SECONDS = 0.5  # a crash loses what came later than that, and the write that was under way
SIGN_SECONDS = 60.0
log = logging.getLogger("flexolmo_jax.usage")


class Recorder:
    """Takes entries from any thread, and appends them in batches.

    What cannot be written, since the disk is full, is kept in memory and tried again.

    Args:
      ledger: this one closes it.
    """

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._new: list[Mapping[str, Any]] = []
        self._changed = threading.Condition()
        self._is_closing, self._failed = False, ""
        self._signed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Queues a use or a sample (entries.py); what is none is logged, and not queued."""
        try:
            check(entry, "a line of the usage ledger")
        except ValueError as error:  # it would keep all others from being written
            log.error("%s", error)
            return
        with self._changed:
            self._new.append(entry)
            self._changed.notify()

    def close(self) -> None:
        """Writes and signs what is left, and waits for it."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        if self._new:
            log.error("the usage ledger lacks the last %d lines: %s", len(self._new), self._failed)
        self._ledger.close()

    def _run(self) -> None:
        while not self._is_closing:
            with self._changed:
                idle = SIGN_SECONDS if self._ledger.contents.unsigned else None
                if not self._new and not self._is_closing:
                    self._changed.wait(idle)
                self._changed.wait_for(lambda: self._is_closing, WRITE_SECONDS)
            self._write()
            if time.monotonic() - self._signed >= SIGN_SECONDS:
                self._sign()
        self._write()
        self._sign()

    def _write(self) -> None:
        with self._changed:
            entries, self._new = self._new, []
        if entries and not self._try(lambda: self._ledger.append(entries)):
            with self._changed:
                self._new = entries + self._new

    def _sign(self) -> None:
        if self._try(self._ledger.checkpoint):
            self._signed = time.monotonic()

    def _try(self, write: Any) -> bool:
        """What fails is logged once, and tried again."""
        try:
            write()
        except Exception as error:  # whatever it is, the server answers on
            if self._failed != str(error):
                self._failed = str(error)
                log.error("the usage ledger cannot be written, and is tried again: %s", error)
            return False
        self._failed = ""
        return True
