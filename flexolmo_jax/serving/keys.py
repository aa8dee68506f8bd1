"""API keys: who may use which experts, and how much.

A file holds the keys' digests, not the keys. A key has 256 random bits, so one SHA-256 keeps it.
"""

import dataclasses
import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from flexolmo_jax.storage.files import replace_file

Mass = Literal["token", "request", "none"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a key permits.

    Attributes:
      name: whose key it is; requests are logged under it.
      sha256: of the key; empty for the policy of a server without keys.
      experts: that it may use; None: all, also those that come later.
      always_on: of these, what no request may switch off.
      tokens_per_minute: of prompts and answers together; None: any number.
      concurrency: how many requests at a time; None: any number.
      expert_mass: what answers say of the experts' shares: of each token, of the whole request, or
        nothing.
    """

    name: str
    sha256: str = ""
    experts: tuple[str, ...] | None = None
    always_on: tuple[str, ...] = ()
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    expert_mass: Mass = "token"

    def __post_init__(self):
        for field in ("experts", "always_on"):
            value = getattr(self, field)
            if value is not None and not (
                isinstance(value, tuple) and all(isinstance(name, str) for name in value)
            ):
                raise ValueError(f"key {self.name!r}: {field} must be names, found {value!r}")
        stray = set() if self.experts is None else set(self.always_on) - set(self.experts)
        if stray:
            raise ValueError(
                f"key {self.name!r}: {', '.join(sorted(stray))} must stay on, but is not among "
                f"its experts: {', '.join(self.experts or ())}"
            )
        for field in ("tokens_per_minute", "concurrency"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"key {self.name!r}: {field} must be at least 1, found {value!r}")
        if self.expert_mass not in ("token", "request", "none"):
            raise ValueError(
                f"key {self.name!r}: expert_mass must be token, request or none, found "
                f"{self.expert_mass!r}"
            )


OPEN = Policy("anybody")


def digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def read_keys(file: Path) -> list[Policy]:
    """Reads a file of keys.

    Raises:
      ValueError: it is missing, no such file, or holds an impossible or repeated key.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["keys"]
        policies = [_policy(entry) for entry in entries]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file}: expected a file that `flexolmo keys add` wrote ({error!r})"
        ) from error
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names):
        raise ValueError(f"{file}: a name has two keys: {', '.join(sorted(names))}")
    return policies


def _policy(entry: dict[str, Any]) -> Policy:
    fields: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in entry.items()}
    return Policy(**fields)


def write_keys(file: Path, policies: Sequence[Policy]) -> None:
    """Replaces a file of keys, in one rename."""
    entries = [dataclasses.asdict(policy) for policy in policies]
    replace_file(file, json.dumps({"keys": entries}, indent=2) + "\n")


def add_key(file: Path, policy: Policy) -> str:
    """Adds a new key to a file, which is made if there is none.

    Returns:
      the key, which is stored nowhere.

    Raises:
      ValueError: the name has a key already.
    """
    policies = read_keys(file) if file.exists() else []
    if policy.name in [known.name for known in policies]:
        raise ValueError(f"{file}: {policy.name!r} has a key already; remove it first")
    key = f"fo-{secrets.token_urlsafe(32)}"
    write_keys(file, [*policies, dataclasses.replace(policy, sha256=digest(key))])
    return key


def remove_key(file: Path, name: str) -> None:
    """Removes a key from a file. Raises ValueError if there is none of that name."""
    policies = read_keys(file)
    left = [policy for policy in policies if policy.name != name]
    if len(left) == len(policies):
        known = ", ".join(policy.name for policy in policies) or "none"
        raise ValueError(f"{file}: no key of {name!r}; there are those of {known}")
    write_keys(file, left)


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
