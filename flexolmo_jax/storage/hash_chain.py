"""Append-only logs: each line holds the digest of the one before it.

Whoever changes, drops or moves a line changes every digest after it; whoever knows the last digest
can tell. The end of a log can be cut off without a trace, unless somebody kept that digest.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flexolmo_jax.storage.locks import locked

START = "0" * 64  # what the first line names as the digest of the one before it
_OWN = ("before", "number", "time")


def append(file: Path, records: Iterable[dict[str, Any]], time: str | None = None) -> str:
    """Appends records, each as a line of JSON, and waits until they are on the disk.

    Args:
      file: the log; made if it is missing, readable by its owner only. Its last line is read and
        checked, not the whole log.
      records: JSON values, which gain `number`, `time` and `before`, a digest.
      time: of all of them; default: now, to the second (UTC).

    Returns:
      the digest of the last line, hexadecimal SHA-256.

    Raises:
      ValueError: the last line is no line of such a log; a record has a field of ours, or a value
        that JSON does not know. Nothing is written.
      OSError: the disk is full, or cannot be written.
    """
    records = list(records)
    for record in records:
        if taken := [name for name in _OWN if name in record]:
            raise ValueError(f"{file}: a record may not have a field {taken[0]!r}")
    lock = file.with_name(f".{file.name}.lock")
    with locked(lock, "is writing to this log", "try again", wait=30):
        number, before = _end(file)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        made = []
        for record in records:
            number += 1
            own = {"number": number, "time": time or now, "before": before}
            line = _line({**own, **record})
            made.append(line + "\n")
            before = _digest(line)
        _write(file, "".join(made).encode())
    return before


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Reads a log from its beginning, and checks every line.

    Yields:
      the records with `number`, `time`, `before`, and `digest`, that of their own line.

    Raises:
      ValueError: a line was changed, dropped, moved, or is not complete; names the first one.
      OSError: the log cannot be read.
    """
    before, number = START, 0
    with open(file, "rb") as opened:
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


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _end(file: Path) -> tuple[int, str]:
    """The number and the digest of the last line: 0 and `START` if there is none."""
    if not file.exists() or not (size := file.stat().st_size):
        return 0, START
    with open(file, "rb") as opened:
        span = 4096
        while True:
            opened.seek(-min(span, size), os.SEEK_END)
            lines = opened.read().splitlines(keepends=True)
            if len(lines) > 1 or span >= size:
                break
            span *= 2
    record = _parse(lines[-1], file, None)
    return record["number"], _digest(lines[-1].decode().removesuffix("\n"))


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
