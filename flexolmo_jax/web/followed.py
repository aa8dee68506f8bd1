"""Files that are followed while a server runs."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

Read = TypeVar("Read")


class Followed(Generic[Read]):
    """What a file says, which is read again once the file is another one.

    A file that cannot be read any more raises for as long as it cannot: whoever withdraws something
    must not be answered from before because of a slip of the pen.

    Args:
      file: replaced as a whole (`storage/files.new_file`), so that its state changes with it.
      read: what the file says; raises ValueError or OSError where that is impossible.
    """

    def __init__(self, file: Path, read: Callable[[], Read]):
        self._file, self._read, self._lock = file, read, threading.Lock()
        self._state: tuple[int, int, int] | None = None
        self._found: Read | None = None

    def current(self) -> Read:
        """What the file says now; other threads wait while one reads it."""
        with self._lock:
            while self._found is None or state(self._file) != self._state:
                self._found, self._state = None, state(self._file)
                self._found = self._read()
            return self._found

    def is_current(self, found: Read) -> bool:
        """Whether the file still says what `current` said."""
        return self._found is found and state(self._file) == self._state


def state(file: Path | None) -> tuple[int, int, int] | None:
    """Differs once a file has been replaced or written; None: there is none."""
    if file is None or not file.exists():
        return None
    found = file.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
