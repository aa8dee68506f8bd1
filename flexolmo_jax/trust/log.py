"""The log of a registry: what was admitted, rejected, removed and revoked, and by whom.

`log.jsonl` in the registry's folder is a hash chain (storage/hash_chain.py), and each of its lines
is signed with a coordinator's key. So no line can be changed, dropped or moved. Its end can be cut
off, down to the line that the last version of the registry names (`Registry.log`), and a reader
that saw more lines before refuses that (`Trusted`).
"""

import datetime
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flexolmo_jax.federation.names import check_name, look
from flexolmo_jax.storage import hash_chain
from flexolmo_jax.storage.files import canonical_digest
from flexolmo_jax.storage.regular_files import open_regular
from flexolmo_jax.trust import keys
from flexolmo_jax.trust.registry import LOG, LogState, Registry
from flexolmo_jax.trust.signers import read_time, time_text, utc_now

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

ADMITTED, REJECTED, REMOVED = "admitted", "rejected", "removed"
REVOKED, REINSTATED = "revoked", "reinstated"
MAX_BYTES = 2**28  # of a log; one with 100,000 lines has a third of it
_NEEDED = {  # by each event
    ADMITTED: ("expert", "package"),
    REJECTED: ("expert", "package", "reason"),
    REMOVED: ("expert", "package"),
    REVOKED: ("reason",),
    REINSTATED: ("reason",),
}
_FIELDS = ("event", "expert", "package", "reason", "report", "key")
_OF_LINE = ("number", "time", "before", *_FIELDS, hash_chain.SIGNATURE, "digest")  # in this order
_SHA256 = re.compile("[0-9a-f]{64}")
_SIGNATURE = re.compile("[0-9a-f]{128}")
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256


class Entry(NamedTuple):
    """A line of the log.

    Attributes:
      number, time, digest: of the line; the first has number 1.
      event: one of `ADMITTED`, `REJECTED`, `REMOVED`, `REVOKED`, `REINSTATED`.
      expert: its name; None where the package is no expert, or of unknown name.
      package: the digest of its manifest. None: all packages of this name, whose are revoked or
        reinstated.
      reason: in words, on one line.
      report: sha256 of the report of its admission, if there is one.
      signer: the name of the coordinator who signed the line.
    """

    number: int
    time: datetime.datetime
    digest: str
    event: str
    expert: str | None
    package: str | None
    reason: str | None
    report: str | None
    signer: str

    @property
    def what(self) -> str:
        """What it is about, for people."""
        package = None if self.package is None else f"package {self.package[:12]}..."
        expert = None if self.expert is None else f"expert {self.expert!r}"
        return " of the ".join(x for x in (package, expert) if x)


def read(registry: Registry) -> tuple[Entry, ...]:
    """Reads the log of a registry, and verifies every line.

    Raises:
      ValueError: a line was changed, dropped or moved, is not signed by a key that was a
        coordinator's at its time, or is not one of such a log; the log is shorter than the
        registry says, or another one, or too large.
    """
    file = registry.folder / LOG
    entries = []
    try:
        with open_regular(file) as opened:  # never waits for a pipe
            size = os.fstat(opened.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{file}: expected at most {MAX_BYTES} bytes, found {size}")
        for record in hash_chain.read(file):
            entries.append(_entry(record, registry, file))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    _check_pin(entries, registry, file)
    return tuple(entries)


def append(
    folder: str | Path,
    key: "EllipticCurvePrivateKey",
    event: str,
    *,
    expert: str | None = None,
    package: str | None = None,
    reason: str | None = None,
    report: str | None = None,
) -> Entry:
    """Verifies the log of a registry, and appends a line.

    Args:
      folder: the registry.
      key: the private key of a coordinator.
      other arguments: as in `Entry`.

    Raises:
      ValueError: the registry or its log is damaged, the key is no coordinator's, or the fields do
        not fit the event; it revokes what is revoked already, or reinstates what is not.
      OSError: the log cannot be written.
    """
    registry = Registry.open(folder)
    public = keys.public_of(key)
    now = utc_now()
    registry.check_signer(public, "coordinator", now=now)
    file = registry.folder / LOG
    if file.exists():
        hash_chain.mend(file)
    before = read(registry)
    given = (event, expert, package, reason, report, keys.key_id(public))
    record = dict(zip(_FIELDS, given, strict=True))
    _check_fields(record, str(file))
    _check_news(revocations(registry, before), record, file)

    lines: list[dict[str, Any]] = []

    def signed(line: dict[str, Any]) -> str:
        lines.append(line)
        return _sign(key, _statement(line, registry))

    file.touch()  # as readable as the registry is
    digest = hash_chain.append(file, [record], time_text(now), signed)
    return _entry({**lines[0], "digest": digest}, registry, file)


def revocations(registry: Registry, entries: Iterable[Entry]) -> dict[str, Entry]:
    """The revocations that hold, by `target`."""
    return _last(registry, entries, REVOKED, REINSTATED)


def rejections(registry: Registry, entries: Iterable[Entry]) -> dict[str, Entry]:
    """The rejections that hold, by `target`; a later admission of the package ends one."""
    return _last(registry, entries, REJECTED, ADMITTED)


def target(expert: str | None, package: str | None) -> str:
    """What an entry is about: one package, or all packages of a name or of its look-alikes."""
    return f"package {package}" if package else f"expert {look(str(expert))}"


def _last(registry: Registry, entries: Iterable[Entry], begins: str, ends: str) -> dict[str, Entry]:
    """What began and has not ended.

    A line says itself when it was written. So whoever has a key that has expired could date one
    back; it may begin something, and ends nothing until a version of the registry names it.
    """
    now, found = utc_now(), dict[str, Entry]()
    current = {
        signer.name for signer in registry.coordinators if signer.start <= now < signer.until
    }
    pinned = 0 if registry.log is None else registry.log.number
    for entry in entries:
        if entry.event == begins:
            found[target(entry.expert, entry.package)] = entry
        elif entry.event == ends and (entry.number <= pinned or entry.signer in current):
            found.pop(target(entry.expert, entry.package), None)
    return found


def _entry(record: dict[str, Any], registry: Registry, file: Path) -> Entry:
    number, where = record["number"], f"{file}, line {record['number']}"
    # One spelling of each line: else a changed last line could say the same.
    if tuple(record) != _OF_LINE or hash_chain.digest_of(record) != record["digest"]:
        raise ValueError(f"{where}: not a line of a registry's log, or changed")
    _check_fields(record, where)
    time = read_time(record["time"], where)
    try:
        signer = registry.signer_of(record["key"])
        if registry.log is not None and number <= registry.log.number:
            signer = signer._replace(revoked=None)  # the root keys have signed this line since
        signer.check("coordinator", None, time)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not _is_signed(signer.key, record, registry):
        raise ValueError(f"{where}: the signature of {signer.name} is wrong, or the line changed")
    own = {name: record[name] for name in _FIELDS[:-1]}
    return Entry(number=number, time=time, digest=record["digest"], signer=signer.name, **own)


def _check_fields(record: dict[str, Any], where: str) -> None:
    """Raises ValueError if the fields of a line are impossible, or do not fit its event."""
    event = record["event"]
    if not isinstance(event, str) or event not in _NEEDED:
        raise ValueError(f"{where}: expected {', '.join(_NEEDED)}, found {event!r:.100}")
    missing = [name for name in _NEEDED[event] if record[name] is None]
    if missing:
        raise ValueError(f"{where}: {event} needs {' and '.join(missing)}")
    if record["expert"] is None and record["package"] is None:
        raise ValueError(f"{where}: {event} needs the name of an expert, or a package's digest")
    if record["expert"] is not None:
        try:
            check_name(record["expert"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    for name in ("package", "report"):
        value = record[name]
        if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
            raise ValueError(f"{where}: expected a sha256 as {name}, found {value!r:.100}")
    reason = record["reason"]
    if reason is not None and not (
        isinstance(reason, str) and reason.strip() and reason.isprintable()
    ):
        raise ValueError(f"{where}: expected a reason on one line of text, found {reason!r:.100}")
    if not isinstance(record["key"], str):
        raise ValueError(f"{where}: expected the id of a key, found {record['key']!r:.100}")


def _check_news(revoked: dict[str, Entry], record: dict[str, Any], file: Path) -> None:
    """Raises ValueError if a line would change nothing: a name or a digest may be a wrong one."""
    known = revoked.get(target(record["expert"], record["package"]))
    if record["event"] == REVOKED and known is not None:
        raise ValueError(
            f"{file}: the {known.what} is revoked since {time_text(known.time)}: {known.reason}"
        )
    if record["event"] == REINSTATED and known is None:
        shown = "; ".join(entry.what for entry in revoked.values()) or "nothing"
        raise ValueError(f"{file}: this is not revoked; what is: {shown}")


def _check_pin(entries: list[Entry], registry: Registry, file: Path) -> None:
    pin = registry.log
    if pin is None:
        return
    if len(entries) < pin.number:
        raise ValueError(
            f"{file}: expected at least {pin.number} lines, as version {registry.version} of the "
            f"registry says, found {len(entries)}: its end is missing; get it again from the "
            "coordinator"
        )
    if entries[pin.number - 1].digest != pin.digest:
        raise ValueError(
            f"{file}, line {pin.number}: another line than version {registry.version} of the "
            "registry says; get the log again from the coordinator"
        )


def state(entries: tuple[Entry, ...]) -> LogState | None:
    """The last line, as a version of the registry names it."""
    return LogState(entries[-1].number, entries[-1].digest) if entries else None


def _statement(line: dict[str, Any], registry: Registry) -> bytes:
    """What is signed: a line without its signature, in this registry's log and no other."""
    kept = {x: line[x] for x in line if x not in ("digest", hash_chain.SIGNATURE)}
    return f"flexolmo log 1 {registry.first_digest} {canonical_digest(kept)}".encode()


def _sign(key: "EllipticCurvePrivateKey", data: bytes) -> str:
    """r and s, 32 bytes each, hexadecimal. (r, -s) is a signature too; the smaller s is taken."""
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    r, s = decode_dss_signature(keys.sign(key, data))
    return f"{r:064x}{min(s, _ORDER - s):064x}"


def _is_signed(public: str, record: dict[str, Any], registry: Registry) -> bool:
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    signature = record[hash_chain.SIGNATURE]
    if not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature):
        return False
    r, s = int(signature[:64], 16), int(signature[64:], 16)
    if s > _ORDER // 2:
        return False
    return keys.is_signed(public, _statement(record, registry), encode_dss_signature(r, s))
