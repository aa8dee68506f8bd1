"""What an expert adds to the public weights: W - W_public of each matrix in any form, and heads."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from flexolmo_jax.federation.package import Package
from flexolmo_jax.modeling.experts import Experts, FeedForward, with_full_feed_forward
from flexolmo_jax.modeling.low_rank import FeedForwardRanks
from flexolmo_jax.storage.tensors import named

NAMES = FeedForwardRanks._fields  # gate, up, down


class Delta(NamedTuple):
    """What an expert changed in one matrix.

    Attributes:
      name: "gate", "up" or "down".
      layer: from 0.
      matrix: float32 [D, F'] or, of `down`, [F', D].
      units: int [F'], the public expert's hidden units that those of a pruned expert came from;
        None: all F, in their order.
    """

    name: str
    layer: int
    matrix: np.ndarray
    units: np.ndarray | None


def form_of(package: Package) -> str:
    """How an expert's matrices are stored, and whether it claims a private training.

    Honest figures of different forms differ.
    """
    experts, entries = package.weights, package.manifest["tensors"]
    form = "full"
    if experts.deltas is not None:
        form = "low-rank"
    elif named(experts)["feed_forward.gate"].shape[-1] < package.config.ffn_width:
        form = "pruned"
    dtypes = {entry["dtype"] for name, entry in entries.items() if name.startswith("feed_forward.")}
    integers = sorted(dtype for dtype in dtypes if dtype.startswith("int"))
    is_private = isinstance(package.manifest["privacy"], dict)
    return " ".join([form, *integers, *(["private"] if is_private else [])])


def deltas(expert: Experts, public: Experts) -> Iterator[Delta]:
    """The deltas of all matrices, layer by layer; one layer is in memory at a time.

    Args:
      expert: a stack of one; leaves may be on disk.
      public: the public expert.
    """
    for layer, (own, base) in enumerate(
        zip(matrices(expert, public), matrices(public, public), strict=True)
    ):
        units = origins(own, base)
        for name in NAMES:
            before = base[name] if units is None else at_units(base, name, units)
            yield Delta(name, layer, own[name] - before, units)


def matrices(expert: Experts, public: Experts) -> Iterator[dict[str, np.ndarray]]:
    """Of each layer gate and up [D, F'] and down [F', D], float32; a pruned expert has fewer units.

    Args:
      expert, public: as in `deltas`.
    """
    own = expert.feed_forward
    is_full = isinstance(own, FeedForward)
    named_own = named(own if is_full else with_full_feed_forward(expert, public).feed_forward)
    for layer in range(public.router.bias.shape[0]):
        yield {name: _layer_of(named_own[name], layer) for name in NAMES}


def at_units(of_layer: dict[str, np.ndarray], name: str, units: np.ndarray) -> np.ndarray:
    """A matrix of a layer, of these hidden units only."""
    return of_layer[name][units] if name == "down" else of_layer[name][:, units]


class Head(NamedTuple):
    """A low-rank head, a b + bias: float64 [D, R], [R, V] and [V]."""

    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray


def head_of(package: Package, name: str) -> Head | None:
    """The part "head" or "evidence" of an expert; None if it has none."""
    leaves = named(package.weights)
    if f"{name}.a" not in leaves:
        return None
    parts = (np.asarray(leaves[f"{name}.{x}"], np.float64)[0, 0] for x in Head._fields)
    return Head(*parts)


def overlap(left: Delta, right: Delta) -> tuple[float, float, float]:
    """<l, r>, <l, l> and <r, r> over the hidden units that both deltas have."""
    a, b = left.matrix, right.matrix
    if left.units is not None or right.units is not None:
        a, b = _common(left, right)
    return products(a, b)


def products(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """<a, b>, <a, a> and <b, b>."""
    return float(np.vdot(a, b)), float(np.vdot(a, a)), float(np.vdot(b, b))


def _common(left: Delta, right: Delta) -> tuple[np.ndarray, np.ndarray]:
    axis = 0 if left.name == "down" else 1
    of_left, of_right = (
        np.arange(x.matrix.shape[axis]) if x.units is None else x.units for x in (left, right)
    )
    _, first, second = np.intersect1d(of_left, of_right, return_indices=True)
    return np.take(left.matrix, first, axis), np.take(right.matrix, second, axis)


def origins(own: dict[str, np.ndarray], public: dict[str, np.ndarray]) -> np.ndarray | None:
    """For each hidden unit of a pruned expert's layer the public one that it came from; else None.

    Pruning refits `down`, and leaves the columns of gate and up as training made them.
    """
    if own["gate"].shape == public["gate"].shape:
        return None
    return np.argmax(likeness(own, public, ("gate", "up")), axis=1)


def likeness(
    left: dict[str, np.ndarray], right: dict[str, np.ndarray], names: Sequence[str] = NAMES
) -> np.ndarray:
    """Cosines of the weights of all pairs of hidden units of two layers: float32 [F', F'']."""

    def directions(of_layer: dict[str, np.ndarray]) -> np.ndarray:
        parts = [of_layer[name].T if name == "down" else of_layer[name] for name in names]
        columns = np.concatenate(parts)
        return columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-30)

    return directions(left).T @ directions(right)


def _layer_of(stack: jax.Array, layer: int) -> np.ndarray:
    part = (slice(layer, layer + 1), *(slice(None) for _ in stack.shape[1:]))
    return np.asarray(stack[part], np.float32)[0, 0]
