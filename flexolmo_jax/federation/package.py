"""Packages: directories of a manifest, Orbax tensors and small files, sealed by digests.

    anchor/   manifest.json  params/  tokenizer.json  public.jsonl
    expert/   manifest.json  params/

The manifest holds the digest of every other file, and of itself. Whatever is written appears at
its place in one rename, complete; whatever is read is checked in full before it is used, and every
command makes the same checks: `read_manifest`, `open_package`, `check_packages`.
"""

import concurrent.futures
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from flexolmo_jax.federation import fields
from flexolmo_jax.federation.fields import FORMAT
from flexolmo_jax.federation.package_files import (
    Expected,
    check_bytes,
    check_listed,
    list_files,
    open_regular,
    tensor_of,
)
from flexolmo_jax.storage import on_disk, tensors
from flexolmo_jax.storage.files import (
    canonical_digest,
    file_digest,
    is_partial,
    new_directory,
    replace_file,
)
from flexolmo_jax.version import __version__

MANIFEST = "manifest.json"
PARAMS = "params"
NO_PRIVACY = "none: trained without differential privacy"


def write_package(
    path: Path, manifest: dict[str, Any], tree: Any, files: dict[str, str] | None = None
) -> None:
    """Writes a package, all at once.

    Args:
      path: where; must not exist, or be an empty folder.
      manifest: kind, name and what else the kind calls for; the rest is filled in here.
      tree: the weights (modules, tuples, dicts).
      files: text files to put beside them, by name.

    Raises:
      ValueError: there is something at `path` already; a weight is not in range, or a fact is
        none that a manifest may hold.
      OSError: the disk is full, or may not be written; `path` is as it was.
    """
    with new_directory(path) as folder:
        named = tensors.named(tree)
        for name, x in named.items():
            tensors.check_in_range(name, x, path)
        tensors.save(folder / PARAMS, named)
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "made_by": f"flexolmo_jax {__version__}",
            **manifest,
            "tensors": tensors.describe(named),
            "files": _digests(folder),
        }
        write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes folder/manifest.json with its own digest in it, replacing an old one atomically.

    Raises:
      ValueError: a field is not what it must be; nothing is written.
    """
    manifest = {key: value for key, value in manifest.items() if key != "digest"}
    fields.check_fields(manifest, folder / MANIFEST)
    manifest["digest"] = canonical_digest(manifest)
    replace_file(folder / MANIFEST, _dump(manifest))


def read_manifest(folder: Path, *, kind: str | None = None) -> dict[str, Any]:
    """Reads a manifest and checks every field of it (not the files it names).

    Raises:
      ValueError: there is none, it was changed, its format is unknown, a field cannot be, or it is
        of another kind.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (expected a package with a {MANIFEST})")
    if not os.path.lexists(file):
        raise ValueError(f"{folder}: no {MANIFEST} there, so this is not a flexolmo_jax package")
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > fields.LARGEST:
            raise ValueError(f"{file}: expected at most {fields.LARGEST} bytes, found {size}")
        data = opened.readall()  # type: ignore[attr-defined]
    manifest = fields.parse(data, file)
    digest = manifest.pop("digest", None)
    try:
        unchanged = canonical_digest(manifest) == digest
        unchanged = unchanged and _dump({**manifest, "digest": digest}).encode() == data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged, not a manifest ({error})") from error
    if not unchanged:
        raise ValueError(
            f"{file}: the manifest was changed after it was written (its digest does not match); "
            "get the package again from its owner"
        )
    manifest = fields.upgrade(manifest)
    fields.check_fields(manifest, file)
    if kind is not None and manifest["kind"] != kind:
        raise ValueError(f"{folder}: expected a package of kind {kind}, found {manifest['kind']}")
    return {**manifest, "digest": digest}


class Package(NamedTuple):
    """A package of which all is checked but the bytes of its files (`check_packages`).

    Attributes:
      folder: where it is.
      manifest: as read; every field is of the type it should be.
      tensors: all of its weights by name, left in their files.
    """

    folder: Path
    manifest: dict[str, Any]
    tensors: dict[str, on_disk.OnDisk]

    @property
    def digest(self) -> str:
        """Of the manifest, and so of all that is in the package."""
        return self.manifest["digest"]

    def weights(self, abstract: Any) -> Any:
        """The tensors in the structure of `abstract`."""
        return tensors.refill(abstract, self.tensors)


def open_package(folder: Path, manifest: dict[str, Any], abstract: Any) -> Package:
    """Checks that a package is regular files only, all listed, with just the tensors expected.

    Nothing of the weights is read, and no memory is used that grows with a shape.

    Args:
      folder: the package.
      manifest: what `read_manifest` gave.
      abstract: its weights, as a tree of anything with a shape; None where it has none.

    Raises:
      ValueError: names the first file, tensor or field that is missing, in excess or unfit.
    """
    named = {} if abstract is None else tensors.named(abstract)
    stored = manifest.get("tensors", {})
    for name in sorted(named.keys() | stored.keys()):
        expected = list(named[name].shape) if name in named else None
        found = stored[name]["shape"] if name in stored else None
        if expected is None:
            raise ValueError(f"{folder}: found a tensor {name}, which has no place in it")
        if found != expected:
            what = "missing" if found is None else f"of shape {found}"
            raise ValueError(
                f"{folder}: expected a tensor {name} of shape {expected}, found it {what}"
            )
    merged = manifest["kind"] == "merged"
    # Of a merged model without a tuned router, `params` is what an undone one left on a killed run.
    beside = ("params",) if merged and "tensors" not in manifest else ()
    found_files = list_files(folder, beside)
    # A killed write of a merged model's manifest, the one file that is replaced in its place.
    left_over = {name for name in found_files if merged and is_partial(name, of=MANIFEST)}
    check_listed(folder, {*manifest["files"], MANIFEST}, found_files.keys() - left_over)
    like = {
        name: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])
        for name, entry in stored.items()
    }
    return Package(folder, manifest, on_disk.open_tensors(folder / PARAMS, like))


def check_packages(packages: Iterable[Package], share: tuple[int, int] = (0, 1)) -> None:
    """Reads every byte of packages: digests of files and tensors, and weights in range.

    `share` is as in `check_bytes`.

    Raises:
      ValueError: names the first file that was changed, or is unfit.
    """
    check_bytes((one for package in packages for one in _expected(package)), share)


def _expected(package: Package) -> Iterator[Expected]:
    data = {str(x.file.relative_to(package.folder)): name for name, x in package.tensors.items()}
    for name, sha256 in package.manifest["files"].items():
        file, tensor = package.folder / name, None
        if name in data:
            of = data[name]
            entry = package.manifest["tensors"][of]
            tensor = (package.tensors[of].nbytes, entry["dtype"], entry["sha256"])
        yield Expected(file, f"{file}{tensor_of(name)}", sha256, tensor)


def privacy_summary(certificate: Any) -> str:
    """One line on the certificate in a manifest (privacy/certificate.py), without verifying it."""
    if certificate == NO_PRIVACY:
        return NO_PRIVACY
    if not isinstance(certificate, dict):
        return f"not a certificate: {certificate!r}"
    values = (certificate.get(name) for name in ("epsilon", "delta", "unit"))
    return "claims epsilon {}, delta {}, unit {}; not verified".format(*values)


def _dump(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _digests(folder: Path) -> dict[str, str]:
    """Of every file of a folder, by its relative path."""
    names = sorted(list_files(folder))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(file_digest, (folder / n for n in names)), strict=True))
