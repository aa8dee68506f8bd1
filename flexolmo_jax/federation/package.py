"""Packages: directories of a manifest, Orbax tensors and small files, sealed by digests.

    anchor/   manifest.json  params/  tokenizer.json  public.jsonl
    expert/   manifest.json  params/

The manifest holds the digest of every other file, and of itself. Whatever is written appears at
its place in one rename, complete. Whatever is read is checked in full before it is used, and every
command makes the same checks: `Package.open` of all but the bytes, `check_packages` of the bytes.

Four verbs say where weights end up: *open* leaves them in their files, *read* brings them into host
memory, *load* puts them onto devices, *write* puts them into files.
"""

import concurrent.futures
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.federation import fields
from flexolmo_jax.federation.fields import FORMAT, INTEGERS
from flexolmo_jax.federation.integers import describe, files_of, leaves_of, open_leaves
from flexolmo_jax.federation.package_files import (
    Expected,
    check_bytes,
    check_listed,
    tensor_of,
)
from flexolmo_jax.modeling.experts import Experts, Ranks
from flexolmo_jax.modeling.low_rank import FeedForwardRanks
from flexolmo_jax.modeling.transformer import Anchor, init_anchor
from flexolmo_jax.storage import tensors
from flexolmo_jax.storage.files import (
    canonical_digest,
    file_digest,
    is_partial,
    new_directory,
    replace_file,
)
from flexolmo_jax.storage.regular_files import list_files, open_regular
from flexolmo_jax.version import __version__

MANIFEST = "manifest.json"
PARAMS = "params"
ROUTER = ("bias", "row")  # the tensors of a merged model whose router was tuned
NO_PRIVACY = "none: trained without differential privacy"


def write_package(
    path: Path, manifest: dict[str, Any], tree: Any, files: dict[str, str] | None = None
) -> None:
    """Writes a package, all at once.

    Args:
      path: where; must not exist, or be an empty folder.
      manifest: kind, name and the other fields of that kind; the rest is filled in here.
      tree: the weights (modules, tuples, dicts); `FromCodes` are stored as integers.
      files: text files to put beside them, by name.

    Raises:
      ValueError: `path` exists and is not empty; a weight is not in range, or a field is not
        what it must be.
      OSError: the disk is full, or cannot be written; `path` is unchanged.
    """
    with new_directory(path) as folder:
        named = tensors.named(tree)
        for name, x in named.items():
            tensors.check_in_range(name, x, path)
        stored = {own: x for name, leaf in named.items() for own, x in files_of(name, leaf)}
        tensors.save(folder / PARAMS, stored)
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        manifest = {
            "format": FORMAT if stored.keys() == named.keys() else INTEGERS,
            "made_by": f"flexolmo_jax {__version__}",
            **manifest,
            "tensors": describe(named),
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
      ValueError: it is missing, was changed, or has an unknown format, an impossible field or
        another kind.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (expected a package with a {MANIFEST})")
    if not os.path.lexists(file):
        raise ValueError(f"{folder}: no {MANIFEST} there, so this is not a flexolmo_jax package")
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > fields.MAX_BYTES:
            raise ValueError(f"{file}: expected at most {fields.MAX_BYTES} bytes, found {size}")
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
    """An opened package: all is checked but the bytes of its files (`check_packages`).

    Attributes:
      folder: where it is.
      manifest: as read; every field is of the type it should be.
      weights: left in their files (`storage.on_disk`): an `Anchor`; or `Experts` with an expert
        axis of 1; or the tensors by name of a merged model's tuned router, none if it has none.
    """

    folder: Path
    manifest: dict[str, Any]
    weights: Any

    @classmethod
    def open(cls, folder: Path, kind: str | None = None) -> "Package":
        """Reads and checks the manifest, once; then checks that every file and tensor fits it.

        Nothing of the weights is read, and no memory is used that grows with a shape.

        Args:
          folder: the package: regular files only, all of them listed in the manifest.
          kind: "anchor", "expert" or "merged"; default: any.

        Raises:
          ValueError: it is missing, or of another kind; names the first file, tensor or field that
            is missing, in excess or unfit.
        """
        manifest = read_manifest(folder, kind=kind)
        leaves = leaves_of(manifest.get("tensors", {}))
        abstract = _abstract(manifest, folder, leaves)
        check_shapes(folder, abstract, leaves)
        _check_files(folder, manifest)
        opened = open_leaves(folder, PARAMS, manifest)
        return cls(folder, manifest, tensors.refill(abstract, opened))

    @property
    def digest(self) -> str:
        """Of the manifest, and so of all that is in the package."""
        return self.manifest["digest"]

    @property
    def config(self) -> ModelConfig:
        """Of an anchor, or of what an expert was made for."""
        return fields.model_of(self.manifest, self.folder / MANIFEST)


def _abstract(manifest: dict[str, Any], folder: Path, stored: dict[str, Any]) -> Any:
    """What a package of its kind holds; of a tuned router, the shapes are checked later."""
    if manifest["kind"] == "merged":
        names = ROUTER if "tensors" in manifest else ()
        return {name: stored.get(name, jax.ShapeDtypeStruct((), "float32")) for name in names}
    config = fields.model_of(manifest, folder / MANIFEST)

    is_anchor = manifest["kind"] == "anchor"
    heads = (f"{'public.' * is_anchor}{name}.a" for name in Ranks._fields)
    ranks = Ranks(*(_last_size(stored.get(name)) for name in heads))

    deltas = None if is_anchor else _deltas(stored)

    hidden = _last_size(stored.get("feed_forward.gate"))  # a pruned expert has fewer units

    def init(key: jax.Array) -> Anchor | Experts:
        if is_anchor:
            return init_anchor(config, key, ranks)
        own = config.replace(ffn_width=hidden) if 0 < hidden < config.ffn_width else config
        return Experts(own, 1, key, ranks, deltas)

    try:
        return jax.eval_shape(init, jax.random.key(0))
    except (TypeError, ValueError, OverflowError) as error:  # of sizes that no array can have
        raise ValueError(f"{folder}: not the config of a model ({error})") from error


def _deltas(stored: dict[str, Any]) -> FeedForwardRanks | None:
    """The ranks of a low-rank expert; None for a full one."""
    names = [f"feed_forward.{name}.a" for name in FeedForwardRanks._fields]
    if not any(name in stored for name in names):
        return None
    return FeedForwardRanks(*(_last_size(stored.get(name)) for name in names))


def _last_size(stored: Any) -> int:
    return stored.shape[-1] if stored is not None and stored.shape else 0


def check_shapes(folder: Path, expected: Any, stored: dict[str, Any]) -> None:
    """Checks that the tensors of a package have the names and shapes of the leaves of a tree.

    Raises:
      ValueError: names the first tensor that is missing, in excess, or of another shape.
    """
    wanted = {name: list(x.shape) for name, x in tensors.named(expected).items()}
    found = {name: list(x.shape) for name, x in stored.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted:
            raise ValueError(f"{folder}: found a tensor {name}, which has no place in it")
        if found.get(name) != wanted[name]:
            what = f"of shape {found[name]}" if name in found else "missing"
            raise ValueError(
                f"{folder}: expected a tensor {name} of shape {wanted[name]}, found it {what}"
            )


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError unless a package is regular files only, all listed."""
    merged = manifest["kind"] == "merged"
    # A killed removal of a tuned router leaves its `params`.
    ignored = (PARAMS,) if merged and "tensors" not in manifest else ()
    files = list_files(folder, ignored)
    # A killed write of a merged model's manifest, the one file that is replaced in its place.
    partial = {name for name in files if merged and is_partial(name, of=MANIFEST)}
    check_listed(folder, {*manifest["files"], MANIFEST}, files.keys() - partial)


def check_packages(packages: Iterable[Package], share: tuple[int, int] = (0, 1)) -> None:
    """Reads every byte of packages: digests of files and tensors, and weights in range.

    `share` is as in `check_bytes`.

    Raises:
      ValueError: names the first file that was changed, or is unfit.
    """
    check_bytes((file for package in packages for file in _expected(package)), share)


def _expected(package: Package) -> Iterator[Expected]:
    stored = {
        str(x.file.relative_to(package.folder)): (x.nbytes, package.manifest["tensors"][own])
        for name, leaf in tensors.named(package.weights).items()
        for own, x in files_of(name, leaf)
    }
    for name, sha256 in package.manifest["files"].items():
        file, tensor = package.folder / name, None
        if name in stored:
            size, entry = stored[name]
            tensor = (size, entry["dtype"], entry["sha256"])
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
