"""Weights in the form that decoding on CPU reads fastest: every matrix an array of its own.

A matrix taken out of a stack would be copied first, since XLA's products there take no part of an
array. For a batch of one, XLA's product streams a matrix at full bandwidth where the summed axis is
the last in memory (and, in bfloat16, where it is not, at a twentieth of it); for larger batches it
is the first axis.
"""

import functools
from typing import NamedTuple

import jax

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.kernels.quantized import Quantized, rounded, store
from flexolmo_jax.modeling.transformer import Backbone, Layers
from flexolmo_jax.storage.tensors import leaf_name

PROJECTIONS = tuple(f"attention.{name}" for name in "qkvo")


class Unstacked(NamedTuple):
    """A copy of the weights, layer by layer and expert by expert; matrices are `Quantized`."""

    layers: Layers
    head: jax.Array | Quantized  # [D, V]


def unstack(
    backbone: Backbone, experts: Experts, config: ModelConfig, turned: bool, int8: bool = False
) -> Unstacked:
    """Copies the weights out of their stacks.

    Args:
      backbone, experts, config: the model.
      turned: matrices with their summed axes last in memory, for a batch of one.
      int8: matrices as 8-bit integers, a scale for each output channel.
    """
    change = jax.jit(functools.partial(store, turned=turned, int8=int8))

    def take(tree, index):  # leaf by leaf: no third copy of all weights at any time
        def one(path, leaf):
            name, leaf = leaf_name(path), leaf[index]
            if name in PROJECTIONS[:3]:  # [D, N, H] -> [D, N*H]
                leaf = leaf.reshape(len(leaf), -1)
            elif name in PROJECTIONS:  # [N, H, D] -> [N*H, D]
                leaf = leaf.reshape(-1, leaf.shape[-1])
            return change(leaf) if name in PROJECTIONS or "feed_forward" in name else leaf

        return jax.tree_util.tree_map_with_path(one, tree)

    num_layers, num_experts = experts.router.bias.shape
    layers = tuple(
        (
            take(backbone.layers, number),
            tuple(take(experts, (number, slice(e, e + 1))) for e in range(num_experts)),
        )
        for number in range(num_layers)
    )
    return Unstacked(layers, change(backbone.head_matrix(config)))


def round_to_int8(backbone: Backbone, experts: Experts) -> tuple[Backbone, Experts]:
    """The stacks with the numbers that `unstack(..., int8=True)` stores.

    Norms, router rows and the embedding stay as they are (a head that is tied to it too, here).
    """

    def change(path, leaf):
        name = leaf_name(path)
        if name.endswith(PROJECTIONS[:3]):  # [L, D, N, H]
            return rounded(leaf.reshape(*leaf.shape[:2], -1)).reshape(leaf.shape)
        if name.endswith(PROJECTIONS[3]):  # [L, N, H, D]
            return rounded(leaf.reshape(len(leaf), -1, leaf.shape[-1])).reshape(leaf.shape)
        return rounded(leaf) if "feed_forward" in name or name.endswith("head") else leaf

    return jax.jit(functools.partial(jax.tree_util.tree_map_with_path, change))((backbone, experts))
