"""Signatures of packages: PACKAGE.sig beside the folder, made by OpenSSF Model Signing.

A package's own files are sealed, so the signature cannot lie among them: that of news/ is news.sig.
It is made by the library `model-signing`, which has no way to verify without hashing every file.
The verifier here therefore parses the bundle itself (`trust.bundle`), and compares the signed
digests with those in the package's manifest, which `check_packages` compares with the bytes:
every byte is read once. Only manifest.json is hashed here.
"""

import datetime
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.federation.fields import parse
from flexolmo_jax.federation.merged import check_package
from flexolmo_jax.federation.package import MANIFEST, Package
from flexolmo_jax.storage.files import new_file
from flexolmo_jax.storage.regular_files import list_files, open_regular
from flexolmo_jax.trust import bundle, keys
from flexolmo_jax.trust.bundle import Bundle
from flexolmo_jax.trust.registry import Registry
from flexolmo_jax.trust.signers import Signer, role_for


def sign_package(path: str | Path, key_file: str | Path) -> Path:
    """Signs an anchor's package, an expert package, or the manifest of a merged model.

    Args:
      path: the package; whoever signs it should have checked it.
      key_file: a private key of `trust.keys.make_keys`.

    Returns:
      the signature's file, beside the package; one that is there is replaced.

    Raises:
      ValueError: the package is damaged, or the key cannot be used; a package of the extra is
        missing. No file is written.
    """
    private = keys.read_private(Path(key_file))
    import model_signing

    package = Package.open(Path(path))
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    signing = model_signing.signing.Config().set_hashing_config(hashing)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "signature"
        signing.use_elliptic_key_signer(private_key=Path(key_file)).sign(package.folder, made)
        data = made.read_bytes()
    file = signature_file(package.folder)
    signed = bundle.read_bundle(data, file)
    check_signed(signed, keys.public_of(private), file)
    try:
        _check_files(signed, package, file)  # the signed digests are those of the bytes
    except ValueError as error:
        raise ValueError(
            f"{package.folder}: damaged, so it is not signed; `flexolmo inspect` says what is wrong"
        ) from error
    with new_file(file, "wb") as opened:
        opened.write(data)
    return file


def verify_signature(
    package: Package, registry: Registry, now: datetime.datetime | None = None
) -> Signer:
    """Verifies the signature of an opened package; the bytes of its files are for `check_packages`.

    Args:
      package: of any kind; its signature lies beside its folder.
      registry: says whose key may sign it.
      now: the time, in UTC; default: that of the clock.

    Returns:
      who signed it.

    Raises:
      ValueError: there is no signature, or it is of another key, of other files, or leaves some
        unsigned; or the signer may not sign this, not now, or no longer.
    """
    file = signature_file(package.folder)
    signed = read_signature(file)
    signer = _signer(signed, registry, file)
    expert = package.manifest["name"] if package.manifest["kind"] == "expert" else None
    try:
        registry.check_signer(signer.key, role_for(package.manifest["kind"]), expert, now)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    check_signed(signed, signer.key, file)
    _check_files(signed, package, file)
    return signer


class Verified(NamedTuple):
    """A package whose signature and bytes were verified, and who signed it."""

    package: Package
    signer: Signer


def verify_package(path: str | Path, check: Callable[[Package], Signer]) -> list[Verified]:
    """Verifies a package in full: its signature, then every byte, once.

    Args:
      path: the package; of a merged model, its anchor and its experts are verified too.
      check: verifies the signature of an opened package: `verify_signature` with a registry.

    Returns:
      the packages that were verified, the one at `path` first.

    Raises:
      ValueError: a signature is missing, wrong or not accepted; a part is missing, damaged or not
        the one that was merged.
    """
    verified: list[Verified] = []
    check_package(Path(path), lambda package: verified.append(Verified(package, check(package))))
    return verified


def signature_file(folder: Path) -> Path:
    """The file of a package's signature: news.sig beside news/, links to the folder resolved."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.sig")


def read_signature(file: Path) -> Bundle:
    """The bundle in a signature file; it is not verified.

    Raises:
      ValueError: the file is missing, is not a regular file, or holds no bundle.
    """
    if not os.path.lexists(file):
        raise ValueError(
            f"{file}: no signature there; the owner makes it with `flexolmo sign`, and sends it "
            "with the package"
        )
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > bundle.MAX_BYTES:
            raise ValueError(f"{file}: expected at most {bundle.MAX_BYTES} bytes, found {size}")
        data = opened.readall()  # type: ignore[attr-defined]
    return bundle.read_bundle(data, file)


def check_signed(signed: Bundle, public: str, file: Path) -> None:
    """Raises ValueError unless a bundle is what this project accepts, signed with a key.

    Args:
      signed: the bundle.
      public: the key, as PEM.
      file: where it was read from, for errors.
    """
    bundle.check_ours(signed, file)
    if signed.hint != bundle.hint_of(public):
        raise ValueError(f"{file}: names another key than {keys.key_id(public)[:12]}")
    if not keys.is_signed(public, signed.signed_bytes, signed.signature):
        raise ValueError(
            f"{file}: the signature is not one of the key {keys.key_id(public)[:12]}; get the "
            "package and its signature again from its owner"
        )


def _signer(signed: Bundle, registry: Registry, file: Path) -> Signer:
    for signer in registry.signers:
        if signed.method == "publicKey" and bundle.hint_of(signer.key) == signed.hint:
            return signer
    bundle.check_ours(signed, file)
    raise ValueError(
        f"{file}: signed with a key that is not in the registry {registry.folder} (version "
        f"{registry.version}); ask its coordinator to add the signer"
    )


def _check_files(signed: Bundle, package: Package, file: Path) -> None:
    """Raises ValueError unless exactly the package's files are signed, as its manifest has them."""
    with open_regular(package.folder / MANIFEST) as opened:
        data = opened.readall()  # type: ignore[attr-defined]
    # The manifest may have been replaced since the package was opened.
    if parse(data, package.folder / MANIFEST).get("digest") != package.digest:
        raise ValueError(f"{package.folder / MANIFEST}: changed while it was verified; try again")
    manifest = {MANIFEST: hashlib.sha256(data).hexdigest()}
    expected = {**package.manifest["files"], **manifest}
    found = {name.replace(os.sep, "/") for name in list_files(package.folder)}
    for name in sorted(expected.keys() | signed.files.keys() | found):
        if name not in signed.files:
            raise ValueError(f"{package.folder / name}: not signed in {file}; delete it, or ask")
        if name not in expected or name not in found:
            raise ValueError(f"{file}: signs {name}, which is not in the package")
        if signed.files[name] != expected[name]:
            raise ValueError(
                f"{package.folder / name}: not the file that was signed in {file} (signed sha256 "
                f"{signed.files[name][:12]}..., found {expected[name][:12]}...); get both again "
                "from the owner"
            )
