"""Locks between processes, and folders that only their owner can read.

A lock is a file that a process holds with flock(2). The operating system releases it when the
process ends, however it ends, so a lock file that a killed process left behind blocks nobody.
The file names its holder only for the message to the next process.

Over NFS, Linux turns flock into a lock of the server, which all hosts see. On a file system
without locks (some FUSE and Lustre mounts), work continues with a warning.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

POLL = 0.05  # seconds between two attempts


@contextlib.contextmanager
def locked(file: Path, busy: str, advice: str, wait: float = 0.0) -> Iterator[None]:
    """Holds a lock file while the body runs; it is gone afterwards.

    Args:
      file: the lock file, in a folder that exists.
      busy: what another holder is doing, for the message: "is changing this model".
      advice: what the user can do about it.
      wait: seconds to wait for another holder to finish.

    Raises:
      ValueError: another process holds it, also after `wait` seconds; the text names the process.
    """
    descriptor = _acquire(file, busy, advice, time.monotonic() + wait)
    if descriptor is None:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # on a full disk, the message is less precise
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield
    finally:
        # While the lock is held: whoever opened the file before sees in `_is_current` that it is
        # no longer the one at its path.
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _acquire(file: Path, busy: str, advice: str, deadline: float) -> int | None:
    """The descriptor that holds the lock; None where there can be none."""
    while True:
        try:
            descriptor = _open(file)
        except OSError as error:
            if isinstance(error, FileNotFoundError):  # its folder; the body will say what is wrong
                return None
            _warn_without(file, error)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise ValueError(f"{file.parent}: {holder} {busy}; {advice}") from None
            time.sleep(POLL)
            continue
        except OSError as error:
            os.close(descriptor)
            _warn_without(file, error)
            return None
        if _is_current(descriptor, file):
            return descriptor
        os.close(descriptor)  # its holder has removed it meanwhile


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except PermissionError as error:
        try:
            return os.open(file, os.O_RDONLY | os.O_NOFOLLOW)  # left behind by another user
        except FileNotFoundError:  # nothing can be written beside what is to be locked
            raise error from None


def _is_current(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(about['pid'])} on {str(about['host'])!r} (since {about['since']})"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _warn_without(file: Path, error: OSError) -> None:
    warnings.warn(
        f"{file.parent}: cannot be locked ({error.strerror}); make sure that no other process "
        "works there at the same time",
        stacklevel=4,
    )


def private_folder(folder: Path) -> bool:
    """Makes a folder that only its owner can read (mode 0700); folders above it as usual.

    An empty folder that is there is treated in the same way. One that holds something stays as it
    is: others may be meant to read what is in it.

    Returns:
      whether the folder is new, or was empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir() or any(folder.iterdir()):
            return False
        with contextlib.suppress(PermissionError):  # of another user
            folder.chmod(0o700)
    return True
