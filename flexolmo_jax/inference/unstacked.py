"""Weights in the form that decoding on CPU reads fastest: every matrix an array of its own.

Decoding reads each weight once a token, so memory bandwidth is its limit. A matrix taken out of a
stack would be copied first, since XLA's products there take no part of an array. For a batch of
one, XLA's product streams a matrix at full bandwidth where the summed axis is the last in memory
(and, in bfloat16, where it is not, at a twentieth of it); for larger batches it is the first axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone, Layers


class Unstacked(NamedTuple):
    """A copy of the weights, layer by layer and expert by expert."""

    layers: Layers
    head: jax.Array  # [D, V]


def unstack(backbone: Backbone, experts: Experts, turned: bool) -> Unstacked:
    """Copies the weights out of their stacks.

    Args:
      backbone, experts: the model.
      turned: matrices with their summed axes last in memory, for a batch of one; `turn_back` makes
        them whole inside of a program.
    """

    def take(tree, index):
        return jax.tree.map(lambda leaf: jnp.array(leaf[index]), tree)

    num_layers, num_experts = experts.router.bias.shape
    layers = tuple(
        (
            take(backbone.layers, number),
            tuple(take(experts, (number, slice(e, e + 1))) for e in range(num_experts)),
        )
        for number in range(num_layers)
    )
    made = _flat(Unstacked(layers, jnp.array(backbone.head_matrix())))
    return jax.jit(_turn)(made) if turned else made


def _flat(weights: Unstacked) -> Unstacked:
    """Projections as plain matrices: [D, N, H] -> [D, N*H], [N, H, D] -> [N*H, D]."""

    def flat(path, leaf):
        if not _name(path).endswith(("attention.q", "attention.k", "attention.v", "attention.o")):
            return leaf
        rows = -1 if _name(path).endswith("o") else leaf.shape[0]
        return leaf.reshape(rows, leaf.shape[-1] if rows < 0 else -1)

    return jax.tree_util.tree_map_with_path(flat, weights)


def _turn(weights: Unstacked) -> Unstacked:
    """Matrices transposed; its own inverse."""

    def turn(path, leaf):
        is_matrix = "feed_forward" in _name(path) or (
            leaf.ndim == 2 and "router" not in _name(path)
        )
        return leaf.mT if is_matrix and "norm" not in _name(path) else leaf

    return jax.tree_util.tree_map_with_path(turn, weights)


def turn_back(weights: Unstacked) -> Unstacked:
    """Shapes as in the modules; XLA takes the turn into its products, and moves nothing."""
    return _turn(weights)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
