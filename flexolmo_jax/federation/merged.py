"""Merged models: opened, checked as a whole, and loaded by concatenation along the expert axis."""

import concurrent.futures
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import LoadedAnchor, open_anchor, read_anchor
from flexolmo_jax.federation.expert import check_made_for, open_expert, read_expert, weights_of
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.federation.package import (
    Package,
    check_packages,
    open_package,
    read_manifest,
)
from flexolmo_jax.federation.shares import Shares, measure_shares
from flexolmo_jax.modeling.experts import Experts, join
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.modeling.transformer import Backbone
from flexolmo_jax.parallel import placement
from flexolmo_jax.parallel.mesh import AXES, EXPERT
from flexolmo_jax.runtime.processes import raise_together
from flexolmo_jax.storage.on_disk import Joined
from flexolmo_jax.storage.tensors import leaf_name


class LoadedModel(NamedTuple):
    """A model in memory, ready to run.

    Attributes:
      backbone, experts: the weights; the public expert is the first of the stack.
      config: sizes; `num_experts` as loaded.
      names: of the experts, in the order of the stack.
      tokenizer: None where there is none.
      ends: ids that end a generated text, beside the tokenizer's separator.
    """

    backbone: Backbone
    experts: Experts
    config: ModelConfig
    names: tuple[str, ...]
    tokenizer: Tokenizer | None
    ends: tuple[int, ...] = ()


class Opened(NamedTuple):
    """A merged model of which all is checked but the bytes of its files (`check_packages`).

    Attributes:
      manifest: of the merged model.
      anchor: its weights in their files, if it is a package.
      parts: the packages of its experts, in order.
      tuned: its own files: a tuned router, or nothing.
    """

    manifest: dict[str, Any]
    anchor: LoadedAnchor
    parts: list[Package]
    tuned: Package

    @property
    def names(self) -> tuple[str, ...]:
        return (PUBLIC, *(part.manifest["name"] for part in self.parts))

    @property
    def config(self) -> ModelConfig:
        return self.anchor.config.replace(
            num_experts=len(self.names),
            active_experts=self.manifest["active_experts"],
            memory=memory_of(self.manifest),
        )

    @property
    def packages(self) -> list[Package]:
        return [self.tuned, *self.anchor.packages, *self.parts]


def open_merged(path: Path, separator: str | None = None) -> Opened:
    """Opens a merged model, its anchor and its packages; reads no weights of packages.

    Args:
      path: the merged model.
      separator: the token that opens documents; default: what was named when it was merged.

    Raises:
      ValueError: a part is missing, unfit, or not the one that was merged.
    """
    manifest = read_manifest(path, kind="merged")
    anchor, parts = _open_parts(path, manifest, separator)
    router = None
    if "tensors" in manifest:
        stacks = [anchor.weights.public, *map(weights_of, parts)]
        router = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), join_files(stacks).router
        )
    return Opened(manifest, anchor, parts, open_package(path, manifest, router))


def check_merged(path: Path) -> Opened:
    """Checks every byte of a merged model, of its anchor and of its packages.

    Raises:
      ValueError: a part is missing, damaged, or not the one that was merged.
    """
    opened = open_merged(path)
    check_packages(opened.packages)
    return opened


def check_package(path: Path) -> dict[str, Any]:
    """Checks every byte of a package of any kind; returns its manifest.

    Raises:
      ValueError: it is missing, damaged or unfit.
    """
    manifest = read_manifest(path)
    if manifest["kind"] == "merged":
        check_merged(path)
    elif manifest["kind"] == "anchor":
        read_anchor(path, on_disk=True)
    else:
        check_packages([open_expert(path)])
    return manifest


def shares_of(opened: Opened) -> Shares | None:
    """The share of public text that each expert of a merged model takes, as `merge` returns it."""
    if not opened.parts:
        return None
    routers = [opened.anchor.weights.public.router, *(weights_of(x).router for x in opened.parts)]
    if opened.tuned.tensors:
        like = Router(0, 0, 0)
        routers = [opened.tuned.weights(like)]
    return measure_shares(opened.anchor, routers, opened.names, opened.config)


def load_merged(
    path: Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    over: tuple[str, ...] = AXES,
    separator: str | None = None,
) -> LoadedModel:
    """Loads a merged model: checks every file, and concatenates along the expert axis.

    Args:
      path: the merged model.
      dtype: of the weights; default: as stored.
      mesh, over: where they go (`placement.device_put`), each device reading its own part of every
        file; with empty experts after them, up to a number that the axis `expert` divides. Of
        several processes, all must load, and each checks its share of the bytes.
      separator: the token that opens documents; default: what was named at the merge.

    Raises:
      ValueError: a part is missing, damaged, or not the one that was merged.
    """
    share = (0, 1) if mesh is None else (jax.process_index(), jax.process_count())

    def load_checked() -> LoadedModel:
        opened = open_merged(path, separator)
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            # While the files are read anyway.
            checked = beside.submit(check_packages, opened.packages, share)
            try:
                loaded = _place(opened, dtype, mesh, over)
            except Exception:  # anything can come of a damaged file,
                checked.result()  # and this says what it was
                raise
            checked.result()
        return loaded

    return load_checked() if mesh is None else raise_together(load_checked)


def load_pair(path: Path, anchor: LoadedAnchor) -> LoadedModel:
    """An owner's own two-expert model: the anchor and one package."""
    expert = read_expert(path, anchor)
    name = read_manifest(path)["name"]
    config = dataclasses.replace(anchor.config, num_experts=2)
    stack = join(anchor.weights.public, expert)
    return LoadedModel(
        anchor.weights.backbone, stack, config, (PUBLIC, name), anchor.tokenizer, anchor.ends
    )


def join_files(stacks: list[Any], empty: int = 0) -> Any:
    """As `join`, of arrays on the host, read when they are placed; with empty experts after them.

    Empty experts (`pad_experts`) have weights 0 and the bias -inf: no token ever chooses them.
    """

    def one(path, *leaves):
        is_bias = leaf_name(path).endswith("bias")
        return Joined(leaves, empty, -np.inf if is_bias else 0.0)

    return jax.tree_util.tree_map_with_path(one, *stacks)


def _place(
    opened: Opened, dtype: str | None, mesh: Mesh | None, over: tuple[str, ...]
) -> LoadedModel:
    anchor, config = opened.anchor, opened.config
    stacks = [anchor.weights.public, *map(weights_of, opened.parts)]
    empty = 0 if mesh is None else -len(stacks) % mesh.shape[EXPERT]
    experts = join_files(stacks, empty)
    if opened.tuned.tensors:
        experts.router = join_files([opened.tuned.weights(experts.router)], empty)
    backbone, experts = placement.device_put((anchor.weights.backbone, experts), mesh, over, dtype)
    return LoadedModel(backbone, experts, config, opened.names, anchor.tokenizer, anchor.ends)


def memory_of(manifest: dict[str, Any]) -> tuple[float, float] | None:
    """Decay and weight of a merged model's router memory; None for a router without."""
    memory = manifest.get("memory")  # not in the manifests of older versions
    return memory and (memory["decay"], memory["weight"])


def _open_parts(
    model: Path, manifest: dict[str, Any], separator: str | None
) -> tuple[LoadedAnchor, list[Package]]:
    """The anchor and the packages of a merged model, if they are those that were merged."""
    folder = model / manifest["anchor"]["path"]
    anchor = open_anchor(folder, separator or manifest["anchor"].get("separator"))
    _check_pin(folder, anchor, manifest["anchor"])
    parts = [open_part(model, entry) for entry in manifest["experts"]]
    for part in parts:
        check_made_for(part, anchor)
    return anchor, parts


def open_part(model: Path, entry: dict[str, str]) -> Package:
    """The package of an entry of a merged model, if it is the one that was merged.

    Raises:
      ValueError: it is missing, unfit, or another one.
    """
    package = open_expert(model / entry["path"])
    found = package.manifest["name"]
    if package.digest != entry["digest"] or found != entry["name"]:
        what = "its manifest differs" if found == entry["name"] else f"its name is {found!r}"
        raise ValueError(
            f"{package.folder}: not the package that was merged as {entry['name']!r} ({what}); "
            "take it out with `flexolmo experts remove` and add it again"
        )
    return package


def _check_pin(folder: Path, anchor: LoadedAnchor, pinned: dict[str, Any]) -> None:
    """That an anchor is the one that was merged, its public text and separator included."""
    if anchor.identity != pinned["identity"]:
        raise ValueError(
            f"{folder}: not the anchor that was merged: expected "
            f"{pinned['identity'][:12]}..., found {anchor.identity[:12]}..."
        )
    expected = pinned.get("digest")  # not in the manifests of older versions
    found = anchor.package and anchor.package.digest
    if expected is not None and found != expected:
        raise ValueError(
            f"{folder}: not the anchor that was merged: it has the same weights, and another "
            f"manifest (expected {expected[:12]}..., found {str(found)[:12]}...)"
        )
