"""Files and folders that appear complete, in one rename, or not at all; digests; TOML files."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def new_file(file: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write, which replaces `file` once the body has ended and its bytes are on the disk.

    Args:
      file: its final place; a file that is there is replaced.
      mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
      OSError: the disk is full, or the folder may not be written; `file` is as it was.
    """
    partial = _partial(file)
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def replace_file(file: Path, text: str) -> None:
    """Writes a text as `new_file` does."""
    with new_file(file) as opened:
        opened.write(text)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` if the body succeeds, and vanishes otherwise.

    Raises:
      ValueError: `path` exists and is not an empty folder.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: already there; choose another --out, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    for beside in path.parent.iterdir():  # what a killed write left
        if is_partial(beside.name, of=path.name):
            shutil.rmtree(beside, ignore_errors=True)
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        os.rename(partial, path)
    except BaseException:
        _remove(partial)
        raise


def is_partial(name: str, of: str) -> bool:
    """Whether `name` is that of an unfinished write of `of`, in the same folder."""
    # Matched in full: `.a.b.ID.partial` is not a write of `a`.
    return re.fullmatch(re.escape(f".{of}.") + r"[0-9a-f]{32}\.partial", name) is not None


def canonical_digest(value: Any) -> str:
    """The sha256 of a JSON value, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(file: Path) -> str:
    """The sha256 of a file's bytes, read in chunks."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_toml(file: Path, what: str) -> dict[str, Any]:
    """The fields of a TOML file.

    Args:
      file: in UTF-8.
      what: it should be, for the message.

    Raises:
      ValueError: it is missing, or no TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: expected {what} ({error}; a text stands in quotes)") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: expected {what} ({error})") from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def _remove(folder: Path) -> None:
    """Removes a folder for good, although TensorStore's threads may still write into it."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return
