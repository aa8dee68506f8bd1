"""Changes of a registry: each is its next version, once enough root keys have signed it."""

import contextlib
import datetime
import os
import tempfile
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
from flexolmo_jax.trust.signers import Revoked, Signer, check_line, read_signer, utc_now

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
      ValueError: the folder is not empty, or a value is impossible.
    """
    need_trust()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not empty; choose another folder for the registry")
    root = _new_root(root_keys, threshold, _until(days))
    return _propose(folder, None, root, key)


def add_signer(folder: Path, signer: Signer, key: "EllipticCurvePrivateKey") -> Change:
    """Adds a signer.

    Raises:
      ValueError: another signer has its name or key; a version waits for signatures; the private
        key is none of the root keys.
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
      ValueError: there is no such signer, its key is revoked, or the reason is no line of text;
        otherwise as `add_signer`.
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
        revoked = Revoked(utc_now(), check_line(reason, "the reason"))
        signers[place] = signer._replace(revoked=revoked).to_json()

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
        needed = role.threshold if threshold is None else threshold
        made = _new_root(root_keys or old, needed, _until(days))
        root.keys, root.roles, root.expires = made.keys, made.roles, made.expires

    return _change(folder, change, key)


def update(folder: Path, source: Path) -> tuple[int, int]:
    """Takes over the newer versions of a registry, and the new lines of its log, from a copy.

    Whoever keeps a folder of their own and only updates it cannot be given an older state again.

    Args:
      folder: the registry as it is known here; for the first time, one that is missing.
      source: a copy that came from somewhere; it may change meanwhile.

    Returns:
      the number of the last version before (0 for none) and now.

    Raises:
      ValueError: the copy does not verify, is older, or is another registry; nothing is taken over.
    """
    need_trust()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; choose another place for the registry")
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        versions = _verified_copy(source, copy)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            return _take_over(folder, source, copy, versions), versions


def _verified_copy(source: Path, copy: Path) -> int:
    """Copies a registry and verifies the copy: whoever can write the source may change it anytime.

    Returns:
      how many versions it has.
    """
    theirs = read_versions(source)[0]
    read_log(theirs)  # nothing is copied that is not one, or too large
    for number in range(1, theirs.version + 1):
        _write(version_file(copy, number), read_file(version_file(source, number)))
    if log := _bytes(source / LOG):
        _write(copy / LOG, log)
    try:
        theirs = read_versions(copy)[0]
        read_log(theirs)
    except ValueError as error:
        raise ValueError(str(error).replace(str(copy), str(source))) from error
    return theirs.version


def _take_over(folder: Path, source: Path, copy: Path, versions: int) -> int:
    """Writes what a verified copy has beyond a registry; returns the version before, 0 for none."""
    is_empty = all(name.startswith(".") for name in os.listdir(folder))
    mine = 0 if is_empty else read_versions(folder)[0].version
    if versions < mine:
        raise ValueError(
            f"{source}: its last version is {versions}, and {folder} has {mine} already; get a "
            "newer copy"
        )
    files = [version_file(Path(), number) for number in range(1, versions + 1)]
    for file in files[:mine]:
        if read_file(folder / file) != read_file(copy / file):
            raise ValueError(f"{source / file}: not the version that {folder} has; it is another")
    log, known = (_bytes(place / LOG) for place in (copy, folder))
    if not log.startswith(known):
        raise ValueError(f"{source / LOG}: not a continuation of {folder / LOG}; get it again")
    if log:
        _write(folder / LOG, log)
    for file in files[mine:]:
        _write(folder / file, read_file(copy / file))
    return mine


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
    root = metadata.signed if before is None else before.signed
    check_follows(metadata, before, file)
    # Whoever can write the folder could put a version there, for others to sign.
    if not metadata.signatures.keys() & root.keys.keys():
        raise ValueError(f"{file}: nobody who has a root key proposed this version; delete it")
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
            f"{folder / PENDING}: this version waits for signatures; look at it with `flexolmo "
            "registry show`, then sign it with `flexolmo registry sign`, or delete it"
        )
    return _sign(folder, before, Metadata(root), key)


def _sign(
    folder: Path,
    before: "Metadata[Root] | None",
    metadata: "Metadata[Root]",
    key: "EllipticCurvePrivateKey",
) -> Change:
    from securesystemslib.signer import CryptoSigner

    is_proposal = not metadata.signatures
    signers = [metadata.signed] if before is None else [before.signed, metadata.signed]
    signers = signers[:1] if is_proposal else signers
    public = public_of(key)
    if not any(key_id(public) in root.keys for root in signers):
        raise ValueError(f"{folder}: the key {key_id(public)[:12]} is none of its root keys")
    metadata.sign(CryptoSigner(key, tuf_key(public)), append=True)
    version, data = metadata.signed.version, metadata.to_bytes()
    missing = check_follows(parse_version(data, folder / PENDING), before, folder / PENDING)
    if before is not None and not missing:
        _check_log(folder, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / PENDING, data)
    if not missing:
        (folder / PENDING).rename(version_file(folder, version))
    return Change(version, missing)


def _check_log(folder: Path, metadata: "Metadata[Root]") -> None:
    """Raises ValueError if nobody could read the log any more once a version is in force."""
    first_digest = read_versions(folder)[0].first_digest
    try:
        read_log(registry_of(folder, metadata, first_digest))
    except ValueError as error:
        raise ValueError(
            f"{folder / PENDING}: this version does not accept what was written into the log since "
            f"it was proposed ({error}); delete it, and propose it again"
        ) from error


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
