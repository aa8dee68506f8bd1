"""What is trusted now: a registry and its log, which may be followed while a process runs."""

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.federation.package import Package
from flexolmo_jax.federation.source import Require
from flexolmo_jax.trust import log
from flexolmo_jax.trust.log import Entry
from flexolmo_jax.trust.registry import Registry
from flexolmo_jax.trust.signatures import verify_signature
from flexolmo_jax.trust.signers import role_for, time_text, utc_now


class Signed(NamedTuple):
    """A package whose signature was verified.

    Attributes:
      kind: "anchor", "expert" or "merged".
      name: of the expert; None for the other kinds.
      digest: of the manifest.
      key: the public key that signed it, as PEM.
    """

    kind: str
    name: str | None
    digest: str
    key: str


class Trusted:
    """A registry and its log, as they were last verified.

    What was seen is not unlearned: `follow` refuses an older version, and a log that lacks lines.

    Attributes:
      folder: of the registry.
      registry, entries: its last version, and its log.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._seen = _state(self.folder)
        self._take(*_read(self.folder))

    @classmethod
    def open(cls, folder: str | Path) -> "Trusted":
        """Reads and verifies a registry and its log.

        Raises:
          ValueError: one of them is damaged, or the registry has expired; a package of the extra
            `trust` is missing.
        """
        return cls(folder)

    def check(self, package: Package) -> Signed:
        """Verifies the signature of a package, and that nothing about it was revoked.

        Args:
          package: of any kind; the bytes of its files are for `check_packages`.

        Returns:
          what `refusal` needs to know of it later.

        Raises:
          ValueError: it is not signed by whom the registry says; it, its key or its expert was
            revoked, or it was rejected: the text says why.
        """
        signed = self.signed(package)
        reason = self.refusal(signed)
        if reason is not None:
            raise ValueError(f"{package.folder}: {reason}")
        return signed

    def signed(self, package: Package) -> Signed:
        """As `check`, of the signature alone: the package may have been revoked or rejected."""
        self.registry.check_current(utc_now())
        signer = verify_signature(package, self.registry)
        kind = package.manifest["kind"]
        name = package.manifest["name"] if kind == "expert" else None
        return Signed(kind, name, package.digest, signer.key)

    def checking(self, tell: Callable[[Signed], None]) -> Require:
        """`check`, for functions that take a requirement; `tell` gets what it returns."""
        return lambda package: tell(self.check(package))

    def refusal(self, signed: Signed, now: datetime.datetime | None = None) -> str | None:
        """Why a package may not be used any more; None: it may.

        Args:
          signed: as `check` returned it.
          now: the time, in UTC; default: that of the clock.
        """
        now = now or utc_now()
        try:
            self.registry.check_current(now)
            self.registry.check_signer(signed.key, role_for(signed.kind), signed.name, now)
        except ValueError as error:
            return str(error)
        if revoked := self.revocation(signed):
            return revoked
        if rejected := self._rejected.get(log.target(signed.name, signed.digest)):
            return f"the {rejected.what} was rejected: {rejected.reason}"
        return None

    def revocation(self, signed: Signed) -> str | None:
        """Why a package, or its expert, was revoked; None: it was not."""
        found = self._revoked.get(log.target(signed.name, signed.digest))
        if found is None and signed.name is not None:
            found = self._revoked.get(log.target(signed.name, None))
        if found is None:
            return None
        return f"the {found.what} was revoked on {time_text(found.time)}: {found.reason}"

    def follow(self) -> bool:
        """Reads the registry and the log again if a file of theirs has changed.

        Returns:
          whether they were read.

        Raises:
          ValueError: they are damaged, or go back behind what was seen: a lower version, a shorter
            log, or another line in it. What was seen before stays in force.
        """
        seen = _state(self.folder)
        if seen == self._seen:
            return False
        registry, entries = _read(self.folder)
        before, known = self.registry, self.entries
        if registry.first_digest != before.first_digest:
            raise ValueError(f"{self.folder}: another registry than before")
        if registry.version < before.version or (
            registry.version == before.version and registry != before
        ):
            raise ValueError(
                f"{self.folder}: version {before.version} of the registry was here before, and is "
                f"gone or another one now; found version {registry.version}"
            )
        if entries[: len(known)] != known:
            raise ValueError(
                f"{self.folder}: its log had {len(known)} lines before, and now lacks some of "
                "them; get it again from the coordinator"
            )
        self._take(registry, entries)
        self._seen = seen
        return True

    def _take(self, registry: Registry, entries: tuple[Entry, ...]) -> None:
        self.registry, self.entries = registry, entries
        self._revoked, self._rejected = log.revocations(entries), log.rejections(entries)


def _read(folder: Path) -> tuple[Registry, tuple[Entry, ...]]:
    registry = Registry.open(folder)
    return registry, log.read(registry)


def _state(folder: Path) -> frozenset[tuple[str, int, int, int]]:
    """Differs once a file of a registry has been replaced or written."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return frozenset()
    return frozenset(
        (name, own.st_ino, own.st_mtime_ns, own.st_size)
        for name, own in found
        if not name.startswith(".")
    )
