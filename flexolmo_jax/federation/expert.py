"""Expert packages: written, checked, and their weights opened in their files."""

from pathlib import Path
from typing import Any

import jax

from flexolmo_jax.federation import fields
from flexolmo_jax.federation.anchor import LoadedAnchor
from flexolmo_jax.federation.names import check_name
from flexolmo_jax.federation.package import (
    MANIFEST,
    NO_PRIVACY,
    Package,
    check_packages,
    open_package,
    read_manifest,
    write_package,
)
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.parallel import placement


def write_expert(
    path: Path, expert: Experts, name: str, anchor: LoadedAnchor, facts: dict[str, Any]
) -> None:
    """Writes an expert package: an expert axis of 1, and what it was made for.

    Args:
      path: where; must not exist.
      expert: a stack of one.
      name: what the expert is called in merged models.
      anchor: the one it was trained beside.
      facts: licence, contact, tokens seen, how the router rows were made.
    """
    manifest = {
        "kind": "expert",
        "name": check_name(name),
        "anchor": anchor.identity,
        "model": anchor.config.architecture(),
        "tokenizer": anchor.tokenizer and anchor.tokenizer.digest,
        "privacy": NO_PRIVACY,
        **facts,
    }
    write_package(path, manifest, expert)


def read_expert(path: Path, anchor: LoadedAnchor) -> Experts:
    """Reads an expert package in full, if it was made for this anchor.

    Raises:
      ValueError: it is missing or damaged, or made for another config, tokenizer or anchor.
    """
    package = open_expert(path)
    check_made_for(package, anchor)
    check_packages([package])
    return placement.device_put(weights_of(package), None)


def open_expert(path: Path) -> Package:
    """An expert package, with the bytes of its files yet to be checked (`check_packages`).

    Raises:
      ValueError: it is missing or damaged.
    """
    manifest = read_manifest(path, kind="expert")
    return open_package(path, manifest, _abstract_expert(manifest, path))


def _abstract_expert(manifest: dict[str, Any], path: Path) -> Experts:
    config = fields.model_of(manifest, path / MANIFEST)
    try:
        return jax.eval_shape(lambda key: Experts(config, 1, key), jax.random.key(0))
    except (TypeError, ValueError, OverflowError) as error:  # of sizes that no array can have
        raise ValueError(f"{path}: not the config of a model ({error})") from error


def weights_of(package: Package) -> Experts:
    return package.weights(_abstract_expert(package.manifest, package.folder))


def check_made_for(package: Package, anchor: LoadedAnchor) -> None:
    """Raises ValueError, saying which, if a package is for another config, tokenizer or anchor."""
    path, manifest = package.folder, package.manifest
    ours, theirs = anchor.config.architecture(), manifest["model"]
    tokenizer = anchor.tokenizer and anchor.tokenizer.digest
    for field in sorted(ours.keys() | theirs.keys()):
        if ours.get(field) != theirs.get(field):
            raise ValueError(
                f"{path}: made for another model config: expected {field}={ours.get(field)}, "
                f"found {theirs.get(field)}"
            )
    if manifest["tokenizer"] != tokenizer:
        raise ValueError(
            f"{path}: made for another tokenizer: expected sha256 {str(tokenizer)[:12]}..., "
            f"found {str(manifest['tokenizer'])[:12]}..."
        )
    if manifest["anchor"] != anchor.identity:
        raise ValueError(
            f"{path}: made for another anchor: expected {anchor.identity[:12]}..., found "
            f"{manifest['anchor'][:12]}...; merge it with the anchor it was trained beside"
        )
