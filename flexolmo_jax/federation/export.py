"""Anchors, experts and merged models, written as Hugging Face directories.

The plain classes of transformers are used only where nothing is lost; else the directory gets a
PyTorch file of ours that computes the rest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from flexolmo_jax.federation.loading import open_model
from flexolmo_jax.federation.merged import OpenedModel
from flexolmo_jax.federation.model_card import model_card
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.federation.package import Package, check_packages
from flexolmo_jax.interop import hf_export
from flexolmo_jax.interop.hf_export import Kind, Mixture
from flexolmo_jax.interop.hf_shards import SHARD_BYTES
from flexolmo_jax.modeling.experts import with_full_feed_forward
from flexolmo_jax.storage.files import new_directory
from flexolmo_jax.storage.outputs import check_new_folder

MEMORY, BIASES = "a router memory", "router biases"


class PlainRouting(NamedTuple):
    """What replaces a router that the plain classes have no place for (`evaluation/folding.py`).

    Attributes:
      rows: of all experts, the biases folded into them: [L, E, D].
      keeps_memory: whether a router memory is kept.
      note: what the replacement costs, for the model card.
    """

    rows: np.ndarray
    keeps_memory: bool
    note: str


class Exported(NamedTuple):
    """What was written.

    Attributes:
      kind: the layout, as `model_type` in config.json.
      names: of the experts in it.
      ranks: in FlexMoRE's layout, of each expert, 0 of a full one; else all 0.
      extras: what the plain classes have no place for, so that our own file computes it.
    """

    kind: Kind
    names: tuple[str, ...]
    ranks: list[int]
    extras: list[str]

    @property
    def needs_our_file(self) -> bool:
        return self.kind == "flexolmo_jax"


def export_model(
    path: Path,
    out: Path,
    *,
    anchor: Path | None = None,
    without: Sequence[str] = (),
    dtype: str | None = None,
    routing: PlainRouting | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes a model as a Hugging Face directory, with a model card.

    Args:
      path: a merged model; an anchor; or an expert package, which is written with its anchor, as
        its owner uses it.
      out: must not exist.
      anchor: of an expert package; default: near it.
      without: names of experts to leave out.
      dtype: of the weights; default: as they are stored.
      routing: takes the place of the model's own, if given.
      shard_bytes: the most that a file of weights has, unless it is one tensor.

    Raises:
      ValueError: a package is damaged; an unknown expert, or none left.
    """
    check_new_folder(out, [path])
    opened = open_model(Package.open(path), anchor)
    model = _mixture(opened, _kept(opened.names, without), routing)
    extras = _extras(model)
    kind = _kind(model, extras)
    if kind != "flexmore":
        public = opened.anchor.weights.public
        full = [with_full_feed_forward(stack, public) for stack in model.stacks]
        model = model._replace(stacks=full)
    exported = Exported(kind, tuple(model.names), model.ranks, extras)
    check_packages(opened.packages)
    with new_directory(out) as folder:
        hf_export.write(
            folder, model, kind, opened.anchor.tokenizer, opened.anchor.ends, dtype, shard_bytes
        )
        card = model_card(opened, kind, exported.names, extras, routing and routing.note)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return exported


def what_is_extra(path: Path, anchor: Path | None = None, without: Sequence[str] = ()) -> list[str]:
    """What a model has that the plain classes have no place for; arguments as in `export_model`."""
    opened = open_model(Package.open(path), anchor)
    return _extras(_mixture(opened, _kept(opened.names, without), None))


def _kept(names: Sequence[str], without: Sequence[str]) -> list[int]:
    """The numbers of the experts that are written."""
    for name in without:
        if name not in names:
            raise ValueError(f"no expert named {name!r}; there are {', '.join(names)}")
    kept = [number for number, name in enumerate(names) if name not in without]
    if not kept:
        raise ValueError(f"all experts are left out; keep at least one of {', '.join(names)}")
    return kept


def _mixture(opened: OpenedModel, kept: list[int], routing: PlainRouting | None) -> Mixture:
    """The model with the experts of these numbers."""
    routers = [jax.tree.map(np.asarray, router) for router in opened.routers]
    rows = np.concatenate([router.row[...] for router in routers], axis=1)
    biases = np.concatenate([router.bias[...] for router in routers], axis=1)
    config = opened.config
    if routing is not None:
        rows, biases = routing.rows, np.zeros_like(biases)
        config = config if routing.keeps_memory else config.replace(memory=None)
    return Mixture(
        opened.anchor.weights.backbone,
        [opened.own_stacks[number] for number in kept],
        rows[:, kept],
        np.minimum(biases[:, kept], 0.0),  # the router never reads more of them
        [opened.names[number] for number in kept],
        opened.names[kept[0]] == PUBLIC,
        config,
    )


def _extras(model: Mixture) -> list[str]:
    """What the plain classes have no place for, in words."""
    headed = [name for name, x in zip(model.names, model.stacks, strict=True) if x.ranks.head]
    found = [f"heads of the experts {', '.join(headed)}"] if headed else []
    if len(model.stacks) == 1:  # its weight is 1, however it is routed
        return found
    if model.config.evidence is not None:
        return [*found, "evidence routing"]
    if model.config.memory is not None:
        found.append(MEMORY)
    if np.any(model.biases < 0):
        found.append(BIASES)
    return found


def _kind(model: Mixture, extras: list[str]) -> Kind:
    if extras:
        return "flexolmo_jax"
    if len(model.stacks) == 1:
        return "olmo2"
    return "flexmore" if any(model.ranks) and model.has_public else "flex_olmo"
