"""Loading: opened weights go onto devices, concatenated along the expert axis.

This is the merge itself. `merge.py` only writes a manifest that names an anchor and packages; here
their arrays become one stack of experts, each device reading its own part of every file.
"""

import concurrent.futures
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import open_anchor
from flexolmo_jax.federation.expert import check_made_for
from flexolmo_jax.federation.merged import OpenedModel, open_merged
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.federation.package import MANIFEST, Package, check_packages, read_manifest
from flexolmo_jax.federation.source import HuggingFace, Require, WeightSource, open_source
from flexolmo_jax.modeling.experts import Experts, pad_experts, split, with_parts
from flexolmo_jax.modeling.int8 import to_int8
from flexolmo_jax.modeling.low_rank import LowRankGroups, MixedFeedForward
from flexolmo_jax.modeling.transformer import Backbone
from flexolmo_jax.parallel import placement
from flexolmo_jax.parallel.mesh import AXES, EXPERT
from flexolmo_jax.runtime.processes import raise_together
from flexolmo_jax.storage.on_disk import Joined
from flexolmo_jax.storage.tensors import leaf_name


class LoadedModel(NamedTuple):
    """A model on devices, ready to run.

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


def load_model(
    path: Path,
    anchor: str | Path | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    over: tuple[str, ...] = AXES,
    separator: str | None = None,
    require: Require | None = None,
) -> LoadedModel:
    """Loads a model of any kind, after checking every digest.

    Args:
      path: a merged model, an anchor, an expert package, or a Hugging Face directory.
      anchor: of an expert package; default: near it (`anchor_path`).
      dtype: of the weights, or "int8" (`modeling.int8`); default: as stored.
      mesh, over: where they go (`placement.device_put`), each device reading its own part of every
        file; with padding experts after them, up to a number that the axis `expert` divides. All
        processes must load, and each checks its share of the bytes.
      separator: the token that opens documents; default: as the model says.
      require: what every package must be (`federation.source`).

    Raises:
      ValueError: a part is missing, damaged, refused, or not the one that was merged.
    """

    def load() -> LoadedModel:
        source = open_source(path, require=require)
        if isinstance(source, HuggingFace):
            return _load_hugging_face(source, dtype, mesh, over, separator)
        return _load(open_model(source, anchor, separator, require), dtype, mesh, over)

    return load() if mesh is None else raise_together(load)


def open_model(
    package: Package,
    anchor: str | Path | None = None,
    separator: str | None = None,
    require: Require | None = None,
) -> OpenedModel:
    """What a package of any kind is loaded as; an expert with its anchor, as its owner uses it.

    `require` is asked about the packages that are opened here, beside `package`.

    Raises:
      ValueError: a part is missing, unfit, refused, or not the one that was merged.
    """
    kind = package.manifest["kind"]
    if kind == "merged":
        return open_merged(package, separator, require)
    if kind == "anchor":
        return OpenedModel(open_anchor(package, separator), [])
    named = separator or package.manifest.get("separator")
    path = anchor_path(package) if anchor is None else Path(anchor)
    source = open_source(path, "anchor", require)
    opened = OpenedModel(open_anchor(source, named), [package])
    check_made_for(package, opened.anchor)
    return opened


def _load(
    opened: OpenedModel,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    over: tuple[str, ...] = AXES,
) -> LoadedModel:
    share = (0, 1) if mesh is None else (jax.process_index(), jax.process_count())
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        # The bytes are checked while the files are read anyway.
        checked = beside.submit(check_packages, opened.packages, share)
        try:
            loaded = _place(opened, dtype, mesh, over)
        except Exception:  # a damaged file can cause any error, and the check says which file
            checked.result()
            raise
        checked.result()
    return loaded


def _place(
    opened: OpenedModel, dtype: str | None, mesh: Mesh | None, over: tuple[str, ...]
) -> LoadedModel:
    anchor, stacks = opened.anchor, opened.stacks(keep_low_rank=True)
    devices = 1 if mesh is None else mesh.shape[EXPERT]
    experts, padding = join_experts(stacks, devices)
    experts.router = _join(opened.routers, padding)
    if dtype == "int8":
        backbone, experts = to_int8(anchor.weights.backbone, experts)
    else:
        backbone, experts = placement.device_put(
            (anchor.weights.backbone, experts), mesh, over, dtype
        )
    return LoadedModel(
        backbone, experts, opened.config, opened.names, anchor.tokenizer, anchor.ends
    )


def join_experts(stacks: list[Experts], devices: int) -> tuple[Experts, int]:
    """As `_join`; full experts, and low-rank ones of each rank, are stacks of their own.

    Args:
      stacks: of one expert each; the full ones first.
      devices: over which full experts are spread. Low-rank ones are on each of them, and then so is
        the public expert once more.

    Returns:
      the experts; and how many more than `stacks` their router must have rows for.
    """
    kinds = [
        [x.feed_forward for x in own] for _, own in itertools.groupby(stacks, lambda x: x.deltas)
    ]
    full, *low_rank = kinds
    if not low_rank:
        padding = -len(stacks) % devices
        return _join(stacks, padding), padding
    padding = -len(full) % devices if len(full) > 1 else 0
    base = full[0] if devices > 1 and len(full) > 1 else None
    groups = LowRankGroups([_join(own, 0) for own in low_rank], base)
    rest = _join([with_parts(x, feed_forward=None) for x in stacks], 0)
    return with_parts(rest, feed_forward=MixedFeedForward(_join(full, padding), groups)), 0


def _join(stacks: list[Any], padding: int) -> Any:
    """As `join`, of arrays on the host, read when they are placed; with padding experts after them.

    Padding experts (`pad_experts`) have weights 0 and the bias -inf: no token ever chooses them.
    """

    def joined(path, *leaves):
        is_bias = leaf_name(path) in ("bias", "router.bias")
        return Joined(leaves, padding, -np.inf if is_bias else 0.0)

    return jax.tree_util.tree_map_with_path(joined, *stacks)


def _load_hugging_face(
    source: HuggingFace,
    dtype: str | None,
    mesh: Mesh | None,
    over: tuple[str, ...],
    separator: str | None,
) -> LoadedModel:
    own = "float32" if dtype == "int8" else dtype
    backbone, experts, config, tokenizer, ends, order = source.load(separator, own)
    names = (PUBLIC, *(f"expert_{i}" for i in order[1:]))
    if mesh is not None and isinstance(experts.feed_forward, MixedFeedForward):
        experts, _ = join_experts(split(experts), mesh.shape[EXPERT])
    elif mesh is not None:
        experts = pad_experts(experts, mesh.shape[EXPERT])
    if dtype == "int8":
        backbone, experts = to_int8(backbone, experts)
    else:
        backbone, experts = placement.device_put((backbone, experts), mesh, over)
    return LoadedModel(backbone, experts, config, names, tokenizer, ends)


def anchor_path(source: WeightSource) -> Path:
    """Where the anchor of a model is: the model itself, named by it, or in a folder near it.

    Raises:
      ValueError: there is no such folder near an expert package.
    """
    if isinstance(source, HuggingFace) or source.manifest["kind"] == "anchor":
        return source.folder
    wanted = source.manifest["anchor"]
    if source.manifest["kind"] == "merged":
        return source.folder / wanted["path"]
    for above in list(source.folder.absolute().parents)[:3]:
        folder = above / "anchor"
        if (folder / MANIFEST).exists():
            if read_manifest(folder, kind="anchor")["identity"] == wanted:
                return folder
    raise ValueError(
        f"{source.folder}: an expert package needs its anchor, and no folder named 'anchor' near "
        f"it is the one it was made for ({wanted[:12]}...); say where it is (anchor=, --anchor)"
    )
