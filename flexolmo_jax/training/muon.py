"""Muon (Jordan et al., 2024) for stacks of matrices, also where they are sharded over devices.

`optax.contrib.muon` multiplies whole matrices, which no device holds here, and gives stacked
tensors AdamW unless told otherwise. This is the same algorithm, with the matrices named, and each
orthogonalized by one device.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import matrix_name
from flexolmo_jax.storage.tensors import leaf_name

MOMENTUM = 0.95
ITERATIONS = 5  # of Newton-Schulz
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-8
RMS = 0.2  # of an update at rate 1, about that of AdamW (Liu et al., 2025, arXiv:2502.16982)
RANK = 4  # axes of every stack of matrices


class Axes(NamedTuple):
    """Where the rows (inputs) and the columns (outputs) of a stack's matrices begin.

    The axes before `rows` number the matrices; the columns are all axes that remain.
    """

    rows: int
    columns: int


FULL = {
    "q": Axes(1, 2),  # [L, D, N, H]
    "k": Axes(1, 2),  # [L, D, K, H]
    "v": Axes(1, 2),  # [L, D, K, H]
    "o": Axes(1, 3),  # [L, N, H, D]
    "gate": Axes(2, 3),  # [L, E, D, F]
    "up": Axes(2, 3),  # [L, E, D, F]
    "down": Axes(2, 3),  # [L, E, F, D]
}
LOW_RANK = {  # the factors of a low-rank matrix, of which a product is used
    "a": Axes(2, 3),  # [1, E, D, R]
    "b": Axes(2, 3),  # [1, E, R, V]
}
MATRICES = FULL | LOW_RANK
OTHERS = {"scale", "bias", "row", "embed", "head"}


def kinds(tree: Any) -> Any:
    """The kind of each leaf of a tree of modules, by its name: "full", "low_rank" or "other".

    Raises:
      ValueError: a leaf is not known, or does not have the axes that its name says.
    """

    def kind(path: tuple, leaf: Any) -> str:
        name = matrix_name(path)
        if name in OTHERS:
            return "other"
        if name not in MATRICES:
            known = ", ".join(sorted(MATRICES.keys() | OTHERS))
            raise ValueError(
                f"{leaf_name(path)}: Muon does not know whether it is a matrix; expected one of "
                f"{known}. Name it in training/muon.py"
            )
        if leaf.ndim != RANK:
            raise ValueError(
                f"{leaf_name(path)}: Muon expected a stack of matrices with {RANK} axes, found "
                f"{list(leaf.shape)}. Correct its axes in training/muon.py"
            )
        return "full" if name in FULL else "low_rank"

    return jax.tree_util.tree_map_with_path(kind, tree)


class MuonState(NamedTuple):
    """The number of steps, and the momentum of each matrix."""

    steps: jax.Array  # int32
    momentum: Any


def scale_by_muon() -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized; for a tree of matrices only.

    The update of an m x n matrix is sqrt(max(m, n)) * RMS times a matrix whose singular values are
    about 1, so that its root mean square is about RMS, whatever its size. As in
    `optax.contrib.muon` with `consistent_rms`.
    """

    def init(params):
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        steps = state.steps + 1
        momentum = optax.tree.update_moment(grads, state.momentum, MOMENTUM, 1)
        ahead = jax.tree.map(
            lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g,
            optax.tree.bias_correction(momentum, MOMENTUM, steps + 1),
            optax.tree.bias_correction(grads, MOMENTUM, steps),
        )
        updates = jax.tree_util.tree_map_with_path(
            lambda path, x: orthogonalize(x, MATRICES[matrix_name(path)]), ahead
        )
        return updates, MuonState(steps, momentum)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array, axes: Axes) -> jax.Array:
    """The update of a stack of matrices, with the shape and the sharding of `x`.

    On a mesh, matrices travel to the devices in equal numbers (an all-to-all), and their updates
    travel back: each is computed once, whole, as on a single device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _of_stack(x, axes, {})
    spec = jax.typeof(x).sharding.spec
    cut = {
        axis - axes.rows + 1: names if isinstance(names, tuple) else (names,)
        for axis, names in enumerate(spec)
        if axis >= axes.rows and names
    }
    return placement.shard_map(lambda x: _of_stack(x, axes, cut), mesh, (spec,), spec)(x)


def _of_stack(x: jax.Array, axes: Axes, cut: dict[int, tuple[str, ...]]) -> jax.Array:
    """`orthogonalize` of this device's shard; `cut` as in `collectives.to_whole_matrices`."""
    shards = x.reshape(-1, *x.shape[axes.rows :])
    whole = collectives.to_whole_matrices(shards, cut)
    rows = math.prod(whole.shape[1 : 1 + axes.columns - axes.rows])
    matrices = whole.reshape(len(whole), rows, -1)
    out = newton_schulz(matrices) * (RMS * max(matrices.shape[1:]) ** 0.5)
    shards = collectives.from_whole_matrices(out.reshape(whole.shape), cut)[: len(shards)]
    return shards.reshape(x.shape)


def newton_schulz(x: jax.Array) -> jax.Array:
    """Matrices [M, m, n] with the singular vectors of x, and singular values of about 1.

    A matrix of zeros stays one. The values end between 0.7 and 1.2, for those that were above about
    1/500 of the matrix's norm; smaller ones grow by 3.4 a step.
    """
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + EPS)
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = first * x + (third * square + fifth * square @ square) @ x
    return x if wide else x.mT
