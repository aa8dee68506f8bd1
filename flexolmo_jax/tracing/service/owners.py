"""The coordinator's file of owners: where each answers traces, and how its service is known."""

import dataclasses
import ssl
import urllib.parse
from pathlib import Path
from typing import Any

from flexolmo_jax.storage.files import read_toml

SECONDS = 5.0
_LOCAL = ("localhost", "127.0.0.1", "::1")
_FIELDS = {"name", "url", "key", "certificate"}


@dataclasses.dataclass(frozen=True)
class Address:
    """Where an owner answers.

    Attributes:
      name: of the owner, which is its expert's.
      url: of its service, without a path's end.
      key: that the owner gave; empty where it asks for none.
      tls: how its certificate is verified.
    """

    name: str
    url: str
    key: str = dataclasses.field(default="", repr=False)
    tls: ssl.SSLContext | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Owners:
    """The owners that a coordinator may ask.

    Attributes:
      seconds: that an owner may take.
      addresses: by name.
    """

    seconds: float
    addresses: dict[str, Address]

    def of(self, names: Any) -> list[Address]:
        """Those of the given names, in the order of the file."""
        return [address for name, address in self.addresses.items() if name in names]


def read_owners(file: Path) -> Owners:
    """Reads a file of owners, in TOML: `seconds`, and a table [[owners]] for each.

    Raises:
      ValueError: it is missing, has an unknown field, names an owner twice, a certificate that is
        none, or an address without TLS on another machine.
    """
    fields = read_toml(file, "a file of owners; see docs/tracing_service.md")
    if stray := sorted(set(fields) - {"seconds", "owners"}):
        raise ValueError(f"{file}: unknown {', '.join(stray)}; expected seconds and [[owners]]")
    seconds, tables = fields.get("seconds", SECONDS), fields.get("owners")
    if type(seconds) not in (int, float) or not 0 < seconds <= 600:
        raise ValueError(f"{file}: seconds: expected a number of 0 to 600, found {seconds!r}")
    if not isinstance(tables, list) or not tables:
        raise ValueError(f"{file}: expected a table [[owners]] for each owner, found none")
    addresses: dict[str, Address] = {}
    for table in tables:
        address = _address(file, table)
        if address.name in addresses:
            raise ValueError(f"{file}: {address.name!r} is there twice")
        addresses[address.name] = address
    return Owners(float(seconds), addresses)


def _address(file: Path, table: Any) -> Address:
    if not isinstance(table, dict) or not {"name", "url"} <= set(table) <= _FIELDS:
        raise ValueError(
            f"{file}: expected name and url of each owner, and key and certificate where there are "
            f"some; found {', '.join(sorted(table)) if isinstance(table, dict) else table!r}"
        )
    for name, value in table.items():
        if not isinstance(value, str) or not value or not value.isascii() or " " in value:
            if name != "certificate":  # a path may be anything
                raise ValueError(f"{file}: {name}: expected a word in ASCII, found {value!r}")
    url = table["url"].rstrip("/")
    try:
        parts = urllib.parse.urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and parts.port != 0 and not parts.username
        host = parts.hostname
    except ValueError:
        is_valid, host = False, None
    if not is_valid or not host or parts.query or parts.fragment:
        raise ValueError(f"{file}: expected https://HOST:PORT of {table['name']}, found {url!r}")
    if parts.scheme == "http" and host not in _LOCAL:
        raise ValueError(
            f"{file}: {url} has no TLS, so that anybody on the way could read and change what is "
            "said; expected https:// (http:// goes to this machine only)"
        )
    tls = None
    if parts.scheme == "https":
        tls = _context(file, table["name"], table.get("certificate"))
    return Address(table["name"], url, table.get("key", ""), tls)


def _context(file: Path, name: str, certificate: Any) -> ssl.SSLContext:
    """Trusts the certificate that the file names and no other; or those that the system trusts."""
    if certificate is None:
        return ssl.create_default_context()
    path = file.parent / str(certificate)
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is one, too
        raise ValueError(
            f"{path}: expected the certificate of {name}, or of who signed it, in PEM ({error})"
        ) from error
