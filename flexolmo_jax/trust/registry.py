"""The registry: a folder of versions that say whose key may sign what.

    registry/   1.json  2.json  ...  pending.json  log.jsonl

Each version is a `Root` of TUF (The Update Framework), written and verified by python-tuf: it has a
number, a day on which it expires, root keys and a threshold. It is signed by a threshold of the
root keys of the version before, and of its own. Beyond TUF's fields its signed part holds `signers`
and `log`, the number and digest of the last line that the log had when the version was made. A
version that still lacks signatures is `pending.json`, which no verifier reads.
"""

import datetime
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flexolmo_jax.storage.regular_files import open_regular
from flexolmo_jax.trust.keys import check_public, key_id, need_trust, tuf_key
from flexolmo_jax.trust.signers import Signer, read_signer, time_text, utc_now

if TYPE_CHECKING:
    from tuf.api.metadata import Metadata, Root

PENDING = "pending.json"
LOG = "log.jsonl"
MAX_BYTES = 2**22  # of a version; one with a thousand signers has a tenth of it
_HEX = re.compile("([0-9a-f]{2})+")
_VERSION = re.compile(r"([1-9][0-9]{0,8})\.json")


class LogState(NamedTuple):
    """The last line of the log when a version was made: its number and its digest."""

    number: int
    digest: str


class Registry(NamedTuple):
    """The last version of a registry, all of whose versions were verified.

    Attributes:
      folder: where it is.
      version: the number of the last version.
      expires: it is refused from this time on.
      first_digest: sha256 of 1.json: whoever has it from the coordinator in another way can tell
        that the registry is the right one.
      root_keys: the public keys of those who change the registry, by id, as PEM.
      threshold: how many of them must sign a version.
      signers: whose keys may sign what.
      log: the state of the log when the version was made; None if it had no line.
    """

    folder: Path
    version: int
    expires: datetime.datetime
    first_digest: str
    root_keys: dict[str, str]
    threshold: int
    signers: tuple[Signer, ...]
    log: LogState | None

    @classmethod
    def open(cls, folder: str | Path, now: datetime.datetime | None = None) -> "Registry":
        """Reads and verifies every version, from 1.json to the last.

        Args:
          folder: the registry.
          now: the time, in UTC; default: that of the clock.

        Raises:
          ValueError: a version is missing, was changed, or lacks signatures; the last one has
            expired; a package of the extra is missing.
        """
        registry = read_versions(Path(folder))[0]
        registry.check_current(now or utc_now())
        return registry

    def check_current(self, now: datetime.datetime) -> None:
        """Raises ValueError if the registry has expired at a time (UTC)."""
        if now >= self.expires:
            raise ValueError(
                f"{self.folder}: version {self.version}, the last, expired on "
                f"{time_text(self.expires)}; get a newer one from the coordinator, who makes it "
                "with `flexolmo registry renew`"
            )

    @property
    def coordinators(self) -> tuple[Signer, ...]:
        """The signers of merged models and of the log, revoked ones too."""
        return tuple(signer for signer in self.signers if signer.role == "coordinator")

    def signer_of(self, key: str) -> Signer:
        """The signer with a public key (PEM), or the id of one.

        Raises:
          ValueError: there is none.
        """
        for signer in self.signers:
            if key in (signer.key, signer.key_id):
                return signer
        shown = key_id(key) if key.startswith("-----") else key
        raise ValueError(f"the key {shown[:12]} is not in the registry {self.folder}")

    def check_signer(
        self, key: str, role: str, expert: str | None = None, now: datetime.datetime | None = None
    ) -> Signer:
        """The signer with a key, if it may sign this now.

        Args:
          key: the public key (PEM), or its id.
          role: "publisher", "owner" or "coordinator".
          expert: the name of the expert, for an owner.
          now: the time, in UTC; default: that of the clock.

        Raises:
          ValueError: the key is unknown, of another role or expert, not valid now, or revoked.
        """
        signer = self.signer_of(key)
        try:
            signer.check(role, expert, now or utc_now())
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error
        return signer


def read_versions(folder: Path) -> "tuple[Registry, Metadata[Root]]":
    """The last version of a registry, expired or not, and its metadata.

    Raises:
      ValueError: a version is missing, was changed, or lacks signatures.
    """
    need_trust()
    numbers = _numbers(folder)
    before, first_digest = None, ""
    for number in range(1, len(numbers) + 1):
        file = version_file(folder, number)
        if number not in numbers:
            raise ValueError(f"{file}: missing, and there is a {max(numbers)}.json; get it again")
        data = read_file(file)
        first_digest = first_digest or hashlib.sha256(data).hexdigest()
        metadata = parse_version(data, file)
        if metadata.signed.version != number:
            raise ValueError(f"{file}: says that it is version {metadata.signed.version}")
        if missing := check_follows(metadata, before, file):
            raise ValueError(f"{file}: lacks {missing} signatures of root keys")
        before = metadata
    assert before is not None
    return registry_of(folder, before, first_digest), before


def parse_version(data: bytes, file: Path) -> "Metadata[Root]":
    """A version from its bytes; every field is checked, and no signature.

    Raises:
      ValueError: it is none, or is spelled in another way than python-tuf writes it.
    """
    from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, Metadata, Root
    from tuf.api.serialization import DeserializationError, SerializationError

    try:
        metadata: Metadata[Root] = Metadata.from_bytes(data)
        root = metadata.signed
        if not isinstance(root, Root) or metadata.to_bytes() != data:
            raise ValueError("not spelled as `flexolmo registry` writes it")
    except (DeserializationError, SerializationError, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{file}: not a version of a registry, or changed ({reason})") from error
    fields = root.unrecognized_fields.keys()
    if fields != {"signers", "log"} or metadata.unrecognized_fields:
        raise ValueError(f"{file}: expected the fields signers and log, and no others beside TUF's")
    if type(root.version) is not int:
        raise ValueError(f"{file}: expected a whole number as version, found {root.version!r:.100}")
    role = root.roles[Root.type]
    if type(role.threshold) is not int or not 1 <= role.threshold <= len(role.keyids):
        raise ValueError(
            f"{file}: expected a threshold from 1 to the number of root keys, "
            f"{len(role.keyids)}; found {role.threshold!r:.100}"
        )
    if any(root.roles[name] != role for name in TOP_LEVEL_ROLE_NAMES):
        raise ValueError(f"{file}: expected all of TUF's roles to have the keys of its root")
    if root.keys.keys() != set(role.keyids):
        raise ValueError(f"{file}: expected exactly the root keys under keys")
    for own, key in root.keys.items():
        # An id of somebody's choice would let one key count as two.
        if tuf_key(check_public(key.keyval.get("public"), str(file))) != key:
            raise ValueError(
                f"{file}: the root key {own[:12]} has another id or kind than expected"
            )
    _signers(root, file)
    _log(root, file)
    return metadata


def check_follows(metadata: "Metadata[Root]", before: "Metadata[Root] | None", file: Path) -> int:
    """Checks a version, whose fields were checked, against the one before it.

    Returns:
      how many signatures it lacks, of the root keys of the version before it or of its own.

    Raises:
      ValueError: a signature that it has is wrong, or is that of no root key; its number does not
        follow; a signer has vanished, or is no longer revoked; the log is shorter.
    """
    _check_kept(metadata, before, file)
    return _lacking(metadata, before, file)


def _lacking(metadata: "Metadata[Root]", before: "Metadata[Root] | None", file: Path) -> int:
    """How many signatures a version lacks: of the version before it, or of itself."""
    from tuf.api.exceptions import RepositoryError

    try:
        result = metadata.signed.get_root_verification_result(
            None if before is None else before.signed, metadata.signed_bytes, metadata.signatures
        )
    except (RepositoryError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    wrong = metadata.signatures.keys() - result.signed.keys()
    for own, signature in metadata.signatures.items():
        if signature.unrecognized_fields or not _HEX.fullmatch(signature.signature):
            wrong |= {own}
    if wrong:
        raise ValueError(
            f"{file}: the signature of key {min(wrong)[:12]} is wrong, or the key is no root key; "
            "get this version again from the coordinator"
        )
    return max(result.first.missing, result.second.missing)


def version_file(folder: Path, number: int) -> Path:
    """The file of a version."""
    return folder / f"{number}.json"


def read_file(file: Path) -> bytes:
    """The bytes of a version's file, if it is a regular one of a reasonable size."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{file}: expected at most {MAX_BYTES} bytes, found {size}")
        return opened.readall()  # type: ignore[attr-defined]


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (expected a registry, with a 1.json)")
    found = [_VERSION.fullmatch(name) for name in os.listdir(folder)]
    numbers = [int(match[1]) for match in found if match]
    if not numbers:
        raise ValueError(f"{folder}: no 1.json there, so this is not a registry")
    return numbers


def _check_kept(metadata: "Metadata[Root]", before: "Metadata[Root] | None", file: Path) -> None:
    """Raises ValueError if a signer or lines of the log have vanished, or a key is valid again."""
    if before is None:
        return
    log, known = _log(metadata.signed, file), _log(before.signed, file)
    if known is not None and (log is None or log.number < known.number):
        raise ValueError(f"{file}: names an earlier line of the log than the version before it")
    now = {signer.name: signer for signer in _signers(metadata.signed, file)}
    for signer in _signers(before.signed, file):
        kept = now.get(signer.name)
        if kept is None or kept._replace(revoked=None) != signer._replace(revoked=None):
            raise ValueError(f"{file}: the signer {signer.name} is missing, or was changed")
        if signer.revoked not in (None, kept.revoked):
            raise ValueError(f"{file}: the key of {signer.name} is no longer revoked as it was")


def registry_of(folder: Path, metadata: "Metadata[Root]", first_digest: str) -> Registry:
    """A registry of a version whose fields were checked."""
    root, file = metadata.signed, version_file(folder, metadata.signed.version)
    keys = {own: key.keyval["public"] for own, key in root.keys.items()}
    threshold = root.roles["root"].threshold
    return Registry(
        folder, root.version, root.expires, first_digest, keys, threshold,
        _signers(root, file), _log(root, file),
    )  # fmt: skip


def _signers(root: "Root", file: Path) -> tuple[Signer, ...]:
    entries = root.unrecognized_fields["signers"]
    if not isinstance(entries, list):
        raise ValueError(f"{file}: expected signers to be a list")
    signers = tuple(read_signer(entry, f"{file}: signer {n}") for n, entry in enumerate(entries, 1))
    for part, what in (("name", "name"), ("key", "key")):
        values = [getattr(signer, part) for signer in signers]
        if len(set(values)) < len(values):
            raise ValueError(f"{file}: two signers have the same {what}; each needs its own")
    return signers


def _log(root: "Root", file: Path) -> LogState | None:
    value: Any = root.unrecognized_fields["log"]
    if value is None:
        return None
    fits = isinstance(value, dict) and value.keys() == {"number", "digest"}
    fits = fits and type(value["number"]) is int and value["number"] > 0
    fits = fits and isinstance(value["digest"], str)
    if not fits or not re.fullmatch("[0-9a-f]{64}", value["digest"]):
        raise ValueError(f"{file}: expected log to be null, or a number and a digest")
    return LogState(value["number"], value["digest"])
