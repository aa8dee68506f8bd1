"""Changes of a registry: each is its next version, once enough root keys have signed it."""

import contextlib
import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flexolmo_jax.storage import hash_chain
from flexolmo_jax.storage.files import new_file
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.storage.regular_files import open_regular
from flexolmo_jax.trust.keys import key_id, need_trust, public_of, tuf_key
from flexolmo_jax.trust.log import read as read_log
from flexolmo_jax.trust.log import state
from flexolmo_jax.trust.registry import (
    LOG,
    PENDING,
    Registry,
    check_follows,
    parse_version,
    read_file,
    read_versions,
    registry_of,
    version_file,
)
from flexolmo_jax.trust.signers import Revoked, Signer, read_signer, utc_now

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from tuf.api.metadata import Metadata, Root

DAYS = 365  # that a version is valid


class Change(NamedTuple):
    """What a change led to.

    Attributes:
      version: the number of the version that was made.
      missing: how many signatures it still lacks; with none, it is in force.
    """

    version: int
    missing: int


def create(
    folder: Path,
    root_keys: Sequence[str],
    threshold: int,
    key: "EllipticCurvePrivateKey",
    days: int = DAYS,
) -> Change:
    """Makes a registry without signers: its version 1.

    Args:
      folder: where; made if it is missing.
      root_keys: public keys (PEM) of those who change the registry.
      threshold: how many of them must sign a version.
      key: the private key of one of them.
      days: until the version expires.

    Raises:
      ValueError: there is one already, or a value is impossible.
    """
    need_trust()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not empty; choose another folder for the registry")
    root = _new_root(root_keys, threshold, _until(days))
    return _propose(folder, None, root, key)


def add_signer(folder: Path, signer: Signer, key: "EllipticCurvePrivateKey") -> Change:
    """Adds a signer.

    Raises:
      ValueError: its name or key is there already; a version waits for signatures; the private key
        is none of the root keys.
    """

    def change(root: "Root") -> None:
        for other in root.unrecognized_fields["signers"]:
            if signer.name == other["name"] or signer.key == other["key"]:
                raise ValueError(
                    f"{folder}: {other['name']} has this name or this key already; each signer "
                    "needs its own, also after a revocation"
                )
        root.unrecognized_fields["signers"].append(signer.to_json())

    return _change(folder, change, key)


def revoke_signer(folder: Path, name: str, reason: str, key: "EllipticCurvePrivateKey") -> Change:
    """Revokes a signer's key, for good: no signature of it is accepted any more.

    Raises:
      ValueError: there is no such signer, or its key is revoked; otherwise as `add_signer`.
    """

    def change(root: "Root") -> None:
        signers = root.unrecognized_fields["signers"]
        names = [signer["name"] for signer in signers]
        if name not in names:
            known = ", ".join(names) or "none"
            raise ValueError(f"{folder}: no signer named {name!r}; there are: {known}")
        place = names.index(name)
        signer = read_signer(signers[place], str(folder))
        if signer.revoked is not None:
            raise ValueError(f"{folder}: the key of {name} is revoked already")
        signers[place] = signer._replace(revoked=Revoked(utc_now(), reason)).to_json()

    return _change(folder, change, key)


def renew(
    folder: Path,
    key: "EllipticCurvePrivateKey",
    days: int = DAYS,
    root_keys: Sequence[str] = (),
    threshold: int | None = None,
) -> Change:
    """Makes a version that expires later; perhaps with other root keys.

    Args:
      folder: the registry, expired or not.
      key: the private key of a root key.
      days: until it expires, from now.
      root_keys: public keys (PEM) that replace all root keys; default: keep them.
      threshold: how many must sign a version from now on; default: as before.

    Raises:
      ValueError: as `add_signer`, or a value is impossible.
    """

    def change(root: "Root") -> None:
        role = root.roles[root.type]
        old = [root.keys[own].keyval["public"] for own in role.keyids]
        made = _new_root(root_keys or old, threshold or role.threshold, _until(days))
        root.keys, root.roles, root.expires = made.keys, made.roles, made.expires

    return _change(folder, change, key)


def update(folder: Path, source: Path) -> tuple[int, int]:
    """Takes over the newer versions of a registry, and the new lines of its log, from a copy.

    Whoever keeps a folder of their own and only updates it cannot be given an older state again.

    Args:
      folder: the registry as it is known here; for the first time, one that is missing.
      source: a copy that came from somewhere.

    Returns:
      the number of the last version before (0 for none) and now.

    Raises:
      ValueError: the copy does not verify, is older, or is another registry; nothing is taken over.
    """
    need_trust()
    theirs = read_versions(source)[0]
    read_log(theirs)
    mine = read_versions(folder)[0].version if folder.exists() else 0
    if theirs.version < mine:
        raise ValueError(
            f"{source}: its last version is {theirs.version}, and {folder} has {mine} already; get "
            "a newer copy"
        )
    names = [f"{number}.json" for number in range(1, theirs.version + 1)]
    for name in names[:mine]:
        if read_file(folder / name) != read_file(source / name):
            raise ValueError(f"{source / name}: not the version that {folder} has; it is another")
    log, known = (_bytes(place / LOG) for place in (source, folder))
    if not log.startswith(known):
        raise ValueError(f"{source / LOG}: not a continuation of {folder / LOG}; get it again")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if log:
            _write(folder / LOG, log)
        for name in names[mine:]:
            _write(folder / name, read_file(source / name))
    return mine, theirs.version


def _bytes(file: Path) -> bytes:
    if not os.path.lexists(file):
        return b""
    with open_regular(file) as opened:
        return opened.readall()  # type: ignore[attr-defined]


def _write(file: Path, data: bytes) -> None:
    with new_file(file, "wb") as opened:
        opened.write(data)


def cosign(folder: Path, key: "EllipticCurvePrivateKey") -> Change:
    """Signs the version that waits for signatures; with the last one missing, it is in force.

    Raises:
      ValueError: none waits, it does not follow the last version, or the key is no root key.
    """
    need_trust()
    with _locked(folder):
        if not (folder / PENDING).exists():
            raise ValueError(f"{folder}: no version waits for a signature")
        before, metadata = _pending(folder)
        return _sign(folder, before, metadata, key)


def read_pending(folder: Path) -> tuple[Registry, int] | None:
    """The version that waits for signatures, and how many it lacks; None if none waits.

    Raises:
      ValueError: it does not follow the last version, or a signature of it is wrong.
    """
    need_trust()
    if not (folder / PENDING).exists():
        return None
    before, metadata = _pending(folder)
    missing = check_follows(metadata, before, folder / PENDING)
    return registry_of(folder, metadata, ""), missing


def _pending(folder: Path) -> "tuple[Metadata[Root] | None, Metadata[Root]]":
    """The last version, and the one that waits."""
    file = folder / PENDING
    metadata = parse_version(read_file(file), file)
    before = read_versions(folder)[1] if version_file(folder, 1).exists() else None
    expected = 1 if before is None else before.signed.version + 1
    if metadata.signed.version != expected:
        raise ValueError(f"{file}: expected version {expected}; delete it, and propose it again")
    return before, metadata


def _change(
    folder: Path, change: Callable[["Root"], None], key: "EllipticCurvePrivateKey"
) -> Change:
    need_trust()
    with _locked(folder):
        before = read_versions(folder)[1]
        # A copy: the signatures of the next version are compared with the keys of this one.
        root = parse_version(before.to_bytes(), folder).signed
        change(root)
        root.version += 1
        root.unrecognized_fields["log"] = _log_state(folder)
        return _propose(folder, before, root, key)


def _propose(
    folder: Path, before: "Metadata[Root] | None", root: "Root", key: "EllipticCurvePrivateKey"
) -> Change:
    from tuf.api.metadata import Metadata

    if (folder / PENDING).exists():
        raise ValueError(
            f"{folder / PENDING}: this version waits for signatures; sign it with `flexolmo "
            "registry sign`, or delete it"
        )
    return _sign(folder, before, Metadata(root), key)


def _sign(
    folder: Path,
    before: "Metadata[Root] | None",
    metadata: "Metadata[Root]",
    key: "EllipticCurvePrivateKey",
) -> Change:
    from securesystemslib.signer import CryptoSigner

    signers = [metadata.signed] if before is None else [before.signed, metadata.signed]
    public = public_of(key)
    if not any(key_id(public) in root.keys for root in signers):
        raise ValueError(f"{folder}: the key {key_id(public)[:12]} is none of its root keys")
    metadata.sign(CryptoSigner(key, tuf_key(public)), append=True)
    version, data = metadata.signed.version, metadata.to_bytes()
    missing = check_follows(parse_version(data, folder / PENDING), before, folder / PENDING)
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / PENDING, "wb") as opened:
        opened.write(data)
    if not missing:
        (folder / PENDING).rename(version_file(folder, version))
    return Change(version, missing)


def _new_root(root_keys: Sequence[str], threshold: int, expires: datetime.datetime) -> "Root":
    from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, Role, Root

    keys = {key.keyid: key for key in map(tuf_key, root_keys)}
    if not 1 <= threshold <= len(keys):
        raise ValueError(
            f"expected a threshold from 1 to the number of root keys, {len(keys)}; found "
            f"{threshold}"
        )
    roles = {name: Role(list(keys), threshold) for name in sorted(TOP_LEVEL_ROLE_NAMES)}
    fields: dict[str, Any] = {"signers": [], "log": None}
    return Root(expires=expires, keys=dict(keys), roles=roles, unrecognized_fields=fields)


def _until(days: int) -> datetime.datetime:
    if not 1 <= days <= 3650:
        raise ValueError(f"expected 1 to 3650 days, found {days}")
    return utc_now() + datetime.timedelta(days=days)


def _log_state(folder: Path) -> dict[str, Any] | None:
    """The last line of the log, all of whose lines were verified: the root keys sign for them."""
    if (folder / LOG).exists():
        hash_chain.mend(folder / LOG)
    last = state(read_log(read_versions(folder)[0]))
    return last and last._asdict()


def _locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    return locked(folder / ".registry.lock", "is changing this registry", "try again", wait=30)
