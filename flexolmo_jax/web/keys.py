"""API keys: files that hold their digests, and how much one key has used lately.

A key has 256 random bits, so one SHA-256 keeps it.
"""

import dataclasses
import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.web.errors import ApiError

Holder = TypeVar("Holder")  # a frozen dataclass with `name` and `sha256`, both str


class KeyFiles(Generic[Holder]):
    """Files of keys of one kind.

    Args:
      kind: what a key permits: a frozen dataclass with `name`, whose key it is, and `sha256`, which
        raises ValueError for impossible values.
      command: that writes such files, for messages.
    """

    def __init__(self, kind: type[Holder], command: str):
        self._kind: Any = kind
        self._command = command

    def read(self, file: Path) -> list[Holder]:
        """Reads a file of keys.

        Raises:
          ValueError: it is missing, no such file, or holds an impossible or repeated key.
        """
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))["keys"]
            holders = [self._holder(entry) for entry in entries]
        except FileNotFoundError as error:
            raise ValueError(f"{file}: no such file; `{self._command}` makes one") from error
        except (
            OSError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError,
            json.JSONDecodeError,
        ) as error:  # fmt: skip
            raise ValueError(
                f"{file}: expected a file that `{self._command}` wrote ({error!r})"
            ) from error
        names = [holder.name for holder in holders]
        if len(set(names)) < len(names):
            raise ValueError(f"{file}: a name has two keys: {', '.join(sorted(names))}")
        return holders

    def _holder(self, entry: dict[str, Any]) -> Any:
        return self._kind(**{n: tuple(x) if isinstance(x, list) else x for n, x in entry.items()})

    def add(self, file: Path, holder: Holder) -> str:
        """Adds a new key to a file, which is made if there is none.

        Returns:
          the key, which is stored nowhere.

        Raises:
          ValueError: the name has a key already.
        """
        new: Any = holder
        holders: list[Any] = list(self.read(file)) if file.exists() else []
        if new.name in [known.name for known in holders]:
            raise ValueError(f"{file}: {new.name!r} has a key already; remove it first")
        key = f"fo-{secrets.token_urlsafe(32)}"
        _write(file, [*holders, dataclasses.replace(new, sha256=digest(key))])
        return key

    def remove(self, file: Path, name: str) -> None:
        """Removes a key from a file. Raises ValueError if there is none of that name."""
        holders: list[Any] = list(self.read(file))
        left = [holder for holder in holders if holder.name != name]
        if len(left) == len(holders):
            known = ", ".join(holder.name for holder in holders) or "none"
            raise ValueError(f"{file}: no key of {name!r}; there are those of {known}")
        _write(file, left)


def _write(file: Path, holders: Sequence[Any]) -> None:
    entries = [dataclasses.asdict(holder) for holder in holders]
    replace_file(file, json.dumps({"keys": entries}, indent=2) + "\n")


def digest(key: str) -> str:
    """What a file keeps of a key: its SHA-256, hexadecimal."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def holder_of(authorization: str | None, by_digest: Mapping[str, Holder]) -> Holder:
    """Whose key a request has.

    Args:
      authorization: the header of that name.
      by_digest: the known keys.

    Raises:
      ApiError: 401, it has none that is known.
    """
    kind, _, key = (authorization or "").partition(" ")
    found = by_digest.get(digest(key.strip())) if kind.lower() == "bearer" else None
    if found is None:
        raise ApiError(
            401,
            "expected the header `Authorization: Bearer KEY`, with a key of this server",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return found


class Meter:
    """What one key has used lately.

    Tokens are taken from a bucket that fills up in a minute.
    """

    def __init__(self) -> None:
        self.running = 0
        self._used, self._at = 0.0, time.monotonic()

    def seconds_until(self, tokens: int, per_minute: int) -> float:
        """How long until that many tokens may be used; 0: now."""
        now = time.monotonic()
        self._used = max(0.0, self._used - (now - self._at) * per_minute / 60)
        self._at = now
        return max(0.0, (self._used + tokens - per_minute) * 60 / per_minute)

    def begin(self, tokens: int) -> None:
        """Counts a request that may use at most this many tokens."""
        self.running += 1
        self._used += tokens

    def end(self, tokens: int, used: int) -> None:
        """Ends a request that `begin` counted, and gives back the tokens that it did not use."""
        self.running -= 1
        self._used += used - tokens
