"""A server of signed packages: which experts may not be used any more, and why."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.trust.trusted import Signed, Trusted

GRACE = 30.0  # seconds in which a registry may be unreadable: one that is being copied is


class Standing(NamedTuple):
    """What of a model may be used.

    Attributes:
      revoked: experts that may not be used, and why.
      refused: why the whole model may not be used; None: it may.
    """

    revoked: dict[str, str]
    refused: str | None


class Followed:
    """A registry that is followed while a server runs.

    A registry that cannot be verified for `GRACE` seconds permits nothing (it fails closed); until
    then what was last verified is in force, and its expiry with it.

    Args:
      folder: the registry.

    Raises:
      ValueError: as `Trusted.open`.
    """

    def __init__(self, folder: Path):
        self._trusted = Trusted.open(folder)
        self._failed: tuple[float, str] | None = None  # since when, and why

    def follow(self) -> None:
        """Reads what has changed; takes long where the log is long.

        Raises:
          ValueError, OSError: it cannot be verified.
        """
        try:
            self._trusted.follow()
        except Exception as error:
            since = time.monotonic() if self._failed is None else self._failed[0]
            self._failed = since, str(error)
            raise
        self._failed = None

    def standing(self, packages: Sequence[Signed]) -> Standing:
        """What may be used of a model.

        Args:
          packages: of the model, as they were when it was loaded.
        """
        revoked, refused = {}, None
        for package in packages:
            reason = self._trusted.refusal(package)
            if reason is not None and package.name is not None:
                revoked[package.name] = reason
            elif reason is not None:
                refused = reason
        if self._failed is not None and time.monotonic() - self._failed[0] > GRACE:
            refused = f"its registry cannot be verified ({self._failed[1]})"
        return Standing(revoked, refused)
