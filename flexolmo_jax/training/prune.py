"""Pruning: an expert with fewer hidden units, fitted to what it did on its owner's text.

The second moments of a layer's hidden units, on the owner's training text, say what the output of
`down` would lose with each unit, if the other units' rows made up for it as well as they can (the
optimal brain surgeon, Hassibi and Stork, 1993, of one linear layer). Units go one by one, least
loss first, and the rows of those that stay are refitted: distillation in closed form.
"""

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch, stacked
from flexolmo_jax.data.sources import Document, is_heldout, read_documents
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor
from flexolmo_jax.federation.compress import REPLACED
from flexolmo_jax.federation.expert import read_expert
from flexolmo_jax.federation.loading import anchor_path
from flexolmo_jax.federation.package import Package, write_package
from flexolmo_jax.modeling.attention import segment_positions
from flexolmo_jax.modeling.experts import Experts, FeedForward, with_parts
from flexolmo_jax.modeling.transformer import Backbone
from flexolmo_jax.storage.outputs import check_new_folder
from flexolmo_jax.storage.tensors import bytes_of, refill
from flexolmo_jax.training.router_fit.inputs import of_the_anchor

TOKENS = 65_536  # of the owner's text, at most
LENGTH = 512  # tokens of a window, at most
SEQUENCES = 16  # in a batch
RIDGE = 1e-4  # of the mean second moment: units that never move keep what they are


class Pruned(NamedTuple):
    """What pruning did.

    Attributes:
      kept: of each layer, the share of the squared norm of its output, on the owner's text, that
        the narrower network gives.
      tokens: of the owner's text that were read.
      bytes_before, bytes_after: of the tensors of the two packages.
    """

    kept: list[float]
    tokens: int
    bytes_before: int
    bytes_after: int


def prune(package: Path, out: Path, width: int, source: str, anchor: Path | None = None) -> Pruned:
    """Writes an expert package again, with `width` hidden units in each layer.

    It merges as any other package: when it is loaded, units of zeros fill it up to the anchor's
    width. Its heads and router rows stay as they are.

    Args:
      package: a full expert, trained without differential privacy: what is fitted here to the
        owner's text is not covered by a certificate.
      out: the new package; must not exist.
      width: F', below the expert's own.
      source: the owner's text, as in `read_documents`; documents that training held out are not
        read.
      anchor: the anchor that it was made for; default: near it (`anchor_path`).

    Raises:
      ValueError: the width is out of range, the package is private, low-rank, damaged or made for
        another anchor, or there is no text; nothing is written.
    """
    check_new_folder(out, [package, source, *([] if anchor is None else [anchor])])
    opened = Package.open(package, "expert")
    _check_can_be_pruned(opened, width)
    loaded = read_anchor(anchor_path(opened) if anchor is None else anchor)
    whole = read_expert(package, loaded)
    moments, tokens = _moments(loaded, whole, _training_documents(opened, source), source)
    assert isinstance(whole.feed_forward, FeedForward)
    downs = np.asarray(whole.feed_forward.down[...], np.float64)[:, 0]
    layers = [remove_units(*layer, width) for layer in zip(moments, downs, strict=True)]
    manifest = {k: v for k, v in opened.manifest.items() if k not in REPLACED}
    manifest["compressed"] = {"from": opened.digest, "width": width}
    narrow = with_parts(opened.weights, feed_forward=_narrow(whole.feed_forward, layers))
    write_package(out, manifest, narrow)
    return Pruned(
        [layer.kept for layer in layers], tokens, bytes_of(opened.weights), bytes_of(narrow)
    )


def _check_can_be_pruned(package: Package, width: int) -> None:
    folder = package.folder
    if isinstance(package.manifest["privacy"], dict):
        raise ValueError(
            f"{folder}: has a privacy certificate, which does not cover what is fitted to the "
            "owner's text once more; use --rank or --bits, which read no text"
        )
    if package.weights.deltas is not None:
        raise ValueError(f"{folder}: is low-rank; expected a full expert: choose --rank or --bits")
    found = package.weights.feed_forward.gate.shape[-1]
    if not 1 <= width < found:
        raise ValueError(
            f"width must be from 1 to {found - 1}, fewer than the units of {folder}, found {width}"
        )


def _training_documents(package: Package, source: str) -> Iterable[Document]:
    split = package.manifest.get("heldout") or {"share": 0, "group_field": "group"}
    documents = read_documents(source, group_field=split["group_field"])
    return (d for d in documents if not (split["share"] and is_heldout(d, split["share"])))


def _moments(
    anchor: LoadedAnchor, expert: Experts, documents: Iterable[Document], source: str
) -> tuple[np.ndarray, int]:
    """The sums of h h' over tokens, [L, F, F], where the expert replaces the public one."""
    assert anchor.tokenizer is not None
    length = min(anchor.config.max_length, LENGTH)
    cut = windows(tokenized(documents, anchor.tokenizer), length, anchor.tokenizer.separator)
    count = max(TOKENS // (length * SEQUENCES), 1)
    config, backbone = of_the_anchor(anchor.config), anchor.weights.backbone
    total: Any = 0.0
    tokens = 0
    for batch in itertools.islice(stacked(cut, SEQUENCES), count):
        total += np.asarray(_of_batch(batch, backbone, expert, config), np.float64)
        tokens += int(np.sum(np.asarray(batch.segments) > 0))
    if not tokens:
        raise ValueError(f"{source}: no text to fit the narrower network to")
    return total, tokens


@functools.partial(jax.jit, static_argnames="config")
def _of_batch(batch: Batch, backbone: Backbone, expert: Experts, config: ModelConfig):
    positions = segment_positions(batch.segments)
    everyone = jnp.ones((len(batch.tokens), 1), bool)
    real = (batch.segments > 0)[..., None]

    def step(x, slices):
        layer, own = slices
        out = layer(x, (own,), positions, batch.segments, everyone, config)
        given, network = out.experts_input.astype(jnp.float32), own.feed_forward
        hidden = jax.nn.silu(given @ network.gate[0]) * (given @ network.up[0])
        flat = jnp.where(real, hidden, 0).reshape(-1, hidden.shape[-1])
        return out.x, flat.T @ flat

    x = backbone.embed[...][batch.tokens].astype(config.dtype)
    return jax.lax.scan(step, x, (backbone.layers, expert.of_layers()))[1]


class Layer(NamedTuple):
    """A narrower layer.

    Attributes:
      units: that stay, in their order, [F'].
      down: their rows, refitted, [F', D].
      kept: as in `Pruned`.
    """

    units: np.ndarray
    down: np.ndarray
    kept: float


def remove_units(moment: np.ndarray, down: np.ndarray, width: int) -> Layer:
    """Removes hidden units one by one, each with the least loss after the refit of all others.

    The rows that stay are the least squares fit of h down to the whole network's output.

    Args:
      moment: sum of h h' over tokens, [F, F], float64.
      down: [F, D], float64.
      width: F', how many stay.
    """
    ridge = RIDGE * np.trace(moment) / len(moment) + np.finfo(np.float64).tiny
    inverse = np.linalg.inv(moment + ridge * np.eye(len(moment)))
    rows, stays = down.copy(), np.ones(len(down), bool)
    for _ in range(len(down) - width):
        spread = np.where(stays, np.diag(inverse), 1.0)
        loss = np.where(stays, np.sum(rows**2, axis=1) / spread, np.inf)
        unit = int(np.argmin(loss))
        column = inverse[:, unit] / inverse[unit, unit]
        rows -= np.outer(column, rows[unit])
        inverse -= np.outer(column, inverse[unit])
        inverse[unit] = inverse[:, unit] = rows[unit] = 0
        stays[unit] = False
    missed = down - rows
    whole = float(np.sum(down * (moment @ down)))
    lost = float(np.sum(missed * (moment @ missed)))
    return Layer(np.flatnonzero(stays), rows[stays], 1 - lost / whole if whole else 1.0)


def _narrow(network: FeedForward, layers: list[Layer]) -> Any:
    """The feed-forward part [L, 1, ...] of the units that stay."""
    gate, up = (
        np.stack([np.asarray(x[...])[n][..., layer.units] for n, layer in enumerate(layers)])
        for x in (network.gate, network.up)
    )
    downs = np.stack([layer.down for layer in layers])[:, None].astype(np.float32)
    return refill(network, {"gate": gate, "up": up, "down": downs})
