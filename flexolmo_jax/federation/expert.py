"""Expert packages: written, read, and checked against the anchor that they were made for."""

from pathlib import Path
from typing import Any

from flexolmo_jax.federation.anchor import LoadedAnchor
from flexolmo_jax.federation.names import check_name
from flexolmo_jax.federation.package import NO_PRIVACY, Package, check_packages, write_package
from flexolmo_jax.modeling.experts import Experts, with_full_feed_forward
from flexolmo_jax.parallel import placement


def write_expert(
    path: Path, expert: Experts, name: str, anchor: LoadedAnchor, facts: dict[str, Any]
) -> None:
    """Writes an expert package: an expert axis of 1, and what it was made for.

    Args:
      path: where; must not exist.
      expert: its weights, with an expert axis of 1.
      name: what the expert is called in merged models.
      anchor: the anchor that it was trained beside.
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

    A low-rank expert is read as the full one that it stands for.

    Raises:
      ValueError: it is missing or damaged, or made for another config, tokenizer or anchor.
    """
    package = Package.open(path, "expert")
    check_made_for(package, anchor)
    check_packages([package])
    public = anchor.weights.public
    return placement.device_put(with_full_feed_forward(package.weights, public), None)


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
