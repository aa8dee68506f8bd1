"""Packages: directories of a manifest, Orbax tensors and small files, sealed by digests.

    anchor/   manifest.json  params/  tokenizer.json  public.jsonl
    expert/   manifest.json  params/

The manifest holds the digest of every other file, and of itself. Whatever is written appears at
its place in one rename, complete; whatever is read is checked in full before it is used.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from flexolmo_jax import tensors
from flexolmo_jax.version import __version__

MANIFEST = "manifest.json"
FORMAT = 1
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
      ValueError: there is something at `path` already.
      OSError: the disk is full, or may not be written; `path` is as it was.
    """
    with new_directory(path) as folder:
        named = tensors.named(tree)
        tensors.save(folder / "params", named)
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
    """Writes folder/manifest.json with its own digest in it, replacing an old one atomically."""
    manifest = {key: value for key, value in manifest.items() if key != "digest"}
    manifest["digest"] = canonical_digest(manifest)
    replace_file(folder / MANIFEST, _dump(manifest))


def replace_file(file: Path, text: str) -> None:
    """Writes a file in one rename, once the text is on the disk."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_manifest(folder: Path, *, kind: str | None = None) -> dict[str, Any]:
    """Reads and checks a manifest (not the files it names).

    Raises:
      ValueError: there is none, it was changed, its format is unknown, or it is of another kind.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (expected a package with a {MANIFEST})")
    if not file.exists():
        raise ValueError(f"{folder}: no {MANIFEST} there, so this is not a flexolmo_jax package")
    try:
        text = file.read_text(encoding="utf-8")
        manifest = dict(json.loads(text))
        digest = manifest.pop("digest")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged, not a manifest ({error})") from error
    if canonical_digest(manifest) != digest or _dump({**manifest, "digest": digest}) != text:
        raise ValueError(
            f"{file}: the manifest was changed after it was written (its digest does not match); "
            "get the package again from its owner"
        )
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{file}: expected package format {FORMAT}, found {manifest.get('format')}; "
            "another version of flexolmo_jax wrote it"
        )
    if kind is not None and manifest["kind"] != kind:
        raise ValueError(f"{folder}: expected a package of kind {kind}, found {manifest['kind']}")
    return {**manifest, "digest": digest}


def check_files(
    folder: Path,
    manifest: dict[str, Any],
    beside: tuple[str, ...] = (),
    share: tuple[int, int] = (0, 1),
) -> None:
    """Compares every file of a package with the manifest.

    Args:
      folder, manifest: the package.
      beside: folders in it that are no part of it.
      share: (k, n) looks into the k-th of n about equal shares of the bytes only, so that several
        processes can do it together; names are all looked at.

    Raises:
      ValueError: names the first file that is missing, changed, or should not be there.
    """
    expected, found = manifest["files"], _digests(folder, beside, share)
    for name in sorted(expected.keys() | found.keys()):
        where = f"{folder / name}{_tensor_of(name)}"
        if name not in found:
            raise ValueError(f"{where}: missing from the package; get it again from its owner")
        if name not in expected:
            raise ValueError(f"{where}: not part of the package; take the file away")
        digest = found[name]
        if digest not in (None, expected[name]):
            raise ValueError(
                f"{where}: changed after the package was written (expected sha256 "
                f"{expected[name][:12]}..., found {str(digest)[:12]}...); get it again from its "
                "owner"
            )


def check_names(folder: Path, manifest: dict[str, Any]) -> None:
    """That every file of a package is there, whatever is in it.

    Raises:
      ValueError: names the first file that is missing.
    """
    for name in sorted(manifest["files"]):
        if not (folder / name).is_file():
            where = f"{folder / name}{_tensor_of(name)}"
            raise ValueError(f"{where}: missing from the package; get it again from its owner")


def find_tensors(folder: Path, manifest: dict[str, Any], abstract: Any) -> Any:
    """As `read_tensors`, but left in the files (`tensors.OnDisk`): read when they are used."""
    named = _as_stored(folder, manifest, abstract)
    return tensors.refill(abstract, tensors.on_disk(folder / "params", named))


def read_tensors(folder: Path, manifest: dict[str, Any], abstract: Any) -> Any:
    """The package's weights in the structure of `abstract` (shapes and dtypes are checked)."""
    named = _as_stored(folder, manifest, abstract)
    return tensors.refill(abstract, tensors.load(folder / "params", named))


def _as_stored(folder: Path, manifest: dict[str, Any], abstract: Any) -> dict[str, Any]:
    expected = tensors.named(abstract)
    stored = manifest["tensors"]
    for name, leaf in expected.items():
        found = stored.get(name)
        if found is None or tuple(found["shape"]) != leaf.shape:
            what = "missing" if found is None else f"of shape {found['shape']}"
            raise ValueError(
                f"{folder}: expected a tensor {name} of shape {list(leaf.shape)}, found it {what}"
            )
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, stored[name]["dtype"])
        for name, leaf in expected.items()
    }


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when all went well, and vanishes otherwise.

    Raises:
      ValueError: there is something at `path` already.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: already there; choose another --out, or take it away first")
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a killed write left. Its name is matched in full: `.a.b.ID` is not one of `a`.
    left_over = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}\.partial")
    for beside in path.parent.iterdir():
        if left_over.fullmatch(beside.name):
            shutil.rmtree(beside, ignore_errors=True)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_name(name: str) -> str:
    """An expert's name, if it may be one. Raises ValueError otherwise."""
    if name == "public" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(
            f"{name!r} cannot be an expert's name: expected up to 64 letters, digits, '.', '_' or "
            "'-', starting with a letter or digit, and not 'public'"
        )
    return name


def privacy_summary(statement: Any) -> str:
    """One line of what a manifest says of privacy (privacy/statement.py), which nobody verified."""
    if statement == NO_PRIVACY:
        return NO_PRIVACY
    if not isinstance(statement, dict):
        return f"not a certificate: {statement!r}"
    values = (statement.get(name) for name in ("epsilon", "delta", "unit"))
    return "claims epsilon {}, delta {}, unit {}; not verified".format(*values)


def canonical_digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _dump(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def _digests(
    folder: Path, beside: tuple[str, ...] = (), share: tuple[int, int] = (0, 1)
) -> dict[str, str | None]:
    """Of every file; None for those of another share."""
    skipped = {folder / MANIFEST, *folder.glob(f".{MANIFEST}.*.partial")}  # of a killed write
    skipped.update(p for name in beside for p in (folder / name).rglob("*"))
    files = sorted(p for p in folder.rglob("*") if not p.is_dir() and p not in skipped)
    this, count = share
    own = sorted(files, key=lambda file: -file.stat().st_size)[this::count]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = dict(zip(own, pool.map(_file_digest, own), strict=True))
    return {str(file.relative_to(folder)): digests.get(file) for file in files}


def _file_digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _tensor_of(name: str) -> str:
    match = re.match(r"params/state/([^/]+)/", name)
    return f" (tensor {match[1]})" if match and match[1] != "array_metadatas" else ""
