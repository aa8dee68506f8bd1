"""Append-only logs: each line holds the digest of the one before it.

Whoever changes, drops or moves a line changes every digest after it; whoever knows the last digest
can tell. The end of a log can be cut off without a trace, unless somebody kept that digest.

A writer that is killed in the middle of a line leaves a torn one, without a newline. Nobody was
told that it had been written, so whoever writes next cuts it off.
"""

import contextlib
import datetime
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flexolmo_jax.storage.locks import locked

START = "0" * 64  # what the first line names as the digest of the one before it
SIGNATURE = "signature"  # the field of a line's signature, in a log whose lines are signed
_OWN = ("before", "number", "time")
_BEGINNING = b'{"number": 1, '  # of every log


def append(
    file: Path,
    records: Iterable[dict[str, Any]],
    time: str | None = None,
    sign: Callable[[dict[str, Any]], str] | None = None,
) -> str:
    """Appends records, each as a line of JSON, and waits until they are on the disk.

    Args:
      file: the log; made if it is missing, readable by its owner only. Its last line is read and
        checked, not the whole log; a torn one is cut off, as in `mend`.
      records: JSON values, which gain `number`, `time` and `before`, a digest.
      time: of all of them; default: now, to the second (UTC).
      sign: given a line without its signature, returns that; the line then has it as its last
        field, `signature`, which its digest covers.

    Returns:
      the digest of the last line, hexadecimal SHA-256.

    Raises:
      ValueError: the last line is no line of such a log; a record has a field of ours, or a value
        that JSON does not know. Nothing is written.
      OSError: the disk is full, or cannot be written.
    """
    records = list(records)
    ours = _OWN if sign is None else (*_OWN, SIGNATURE)
    for record in records:
        if taken := [name for name in ours if name in record]:
            raise ValueError(f"{file}: a record may not have a field {taken[0]!r}")
    with _writing(file):
        number, before = _end(_mended(file), file)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        made = []
        for record in records:
            number += 1
            whole = {"number": number, "time": time or now, "before": before, **record}
            if sign is not None:
                whole[SIGNATURE] = sign(whole)
            line = _line(whole)
            made.append(line + "\n")
            before = _digest(line)
        _write(file, "".join(made).encode())
    return before


def mend(file: Path) -> None:
    """Cuts off a torn last line, with a warning; for a log that is read before it is written.

    Raises:
      ValueError: what comes before it is no log.
      OSError: the log cannot be written.
    """
    with _writing(file):
        _mended(file)


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Reads a log from its beginning, and checks every line.

    Yields:
      the records with `number`, `time`, `before`, and `digest`, that of their own line.

    Raises:
      ValueError: a line was changed, dropped, moved, or is not complete; names the first one. The
        log is missing, or cannot be read.
    """
    before, number = START, 0
    try:
        log = open(file, "rb")
    except OSError as error:
        raise ValueError(f"{file}: expected an append-only log ({error.strerror})") from error
    with log as opened:
        for data in opened:
            number += 1
            record = _parse(data, file, number)
            if record["number"] != number or record["before"] != before:
                raise ValueError(
                    f"{file}, line {number}: the chain is broken: this line or one before it was "
                    "changed, dropped or moved"
                )
            before = _digest(data.decode().removesuffix("\n"))
            yield {**record, "digest": before}


def digest_of(record: dict[str, Any]) -> str:
    """The digest that a record of `read` has if its line is spelled as `append` spells lines."""
    return _digest(_line({name: x for name, x in record.items() if name != "digest"}))


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    lock = file.with_name(f".{file.name}.lock")
    with locked(lock, "is writing to this log", "try again", wait=30):
        yield


def _mended(file: Path) -> bytes:
    """Cuts off a torn last line; returns the last whole one, empty if there is none."""
    if not file.exists() or not file.stat().st_size:
        return b""
    with open(file, "r+b") as opened:
        whole, torn = _last_lines(opened)
        if not torn:
            return whole
        if whole:
            _parse(whole, file, None)
        elif not (torn.startswith(_BEGINNING) or _BEGINNING.startswith(torn)):
            raise ValueError(
                f"{file}, last line: expected a line of an append-only log, found {torn[:40]!r}"
            )
        opened.truncate(opened.seek(0, os.SEEK_END) - len(torn))
        os.fsync(opened.fileno())
    text = f"{file}: cut off {len(torn)} bytes of an unfinished last line"
    warnings.warn(text, stacklevel=4)
    return whole


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _end(last: bytes, file: Path) -> tuple[int, str]:
    """The number and the digest of the last line: 0 and `START` if there is none."""
    if not last:
        return 0, START
    record = _parse(last, file, None)
    return record["number"], _digest(last.decode().removesuffix("\n"))


def _last_lines(opened: BinaryIO) -> tuple[bytes, bytes]:
    """The last whole line, and a torn one after it; each empty if there is none."""
    size = opened.seek(0, os.SEEK_END)
    span = 4096
    while True:
        span = min(span, size)
        opened.seek(-span, os.SEEK_END)
        *whole, torn = opened.read().split(b"\n")
        if len(whole) > 1 or span == size:
            return (whole[-1] + b"\n" if whole else b""), torn
        span *= 2


def _parse(data: bytes, file: Path, number: int | None) -> dict[str, Any]:
    where = f"{file}, {'last line' if number is None else f'line {number}'}"
    try:
        if not data.endswith(b"\n"):
            raise ValueError("it does not end: its writer was killed, or writes it now")
        record = json.loads(data)
        if not isinstance(record, dict) or any(name not in record for name in _OWN):
            raise ValueError(f"no object with {', '.join(_OWN)}")
        if type(record["number"]) is not int:
            raise ValueError("its number is none")
    except (ValueError, RecursionError) as error:  # of Unicode and JSON, too
        raise ValueError(f"{where}: expected a line of an append-only log ({error})") from error
    return record


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _write(file: Path, data: bytes) -> None:
    """Appends all of `data`; or, if the disk is full, nothing."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
