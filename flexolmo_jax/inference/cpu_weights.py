"""Weights in the layout that decoding on CPU reads fastest: every matrix is an array of its own.

XLA for CPU copies a slice of a stack before a matmul reads it. An array of the slice's own need not
be a copy: it is a view of the stack's memory, unless the numbers or their order change. They do for
8-bit integers; and in a batch of one, in bfloat16 and in 8 bits, XLA's matmul streams a matrix at
full memory bandwidth only if the contracted axis is the last in memory.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.experts import Experts, FeedForward
from flexolmo_jax.modeling.kernels.quantized import Quantized, quantize, round_matrix
from flexolmo_jax.modeling.low_rank import FeedForwardRanks, LowRankGroups, MixedFeedForward
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.modeling.transformer import Backbone, Layer
from flexolmo_jax.storage.tensors import leaf_name

PROJECTIONS = tuple(f"attention.{name}" for name in "qkvo")
MATRICES = FeedForwardRanks._fields  # gate, up and down


class UnstackedLayer(NamedTuple):
    """The weights of one layer, without the leading axis L."""

    shared: Layer
    router: Router  # of all experts
    networks: tuple[FeedForward | LowRankGroups, ...]  # full ones are stacks of one


class Unstacked(NamedTuple):
    """The weights, layer by layer and expert by expert; matrices are `Quantized`.

    Low-rank experts stay together, in one stack after the others.
    """

    layers: tuple[UnstackedLayer, ...]
    head: Quantized  # [D, V]


def unstack(
    backbone: Backbone, experts: Experts, config: ModelConfig, transposed: bool, int8: bool = False
) -> Unstacked:
    """Takes the weights out of their stacks; without `transposed` and `int8` they are not copied.

    Args:
      backbone, experts, config: the model.
      transposed: store matrices with the contracted axis last in memory, for a batch of one.
      int8: store matrices as 8-bit integers with a scale for each output channel.
    """
    convert = jax.jit(functools.partial(quantize, transposed=transposed, int8=int8))

    def matrix(x):
        return convert(x) if transposed or int8 else Quantized(x, None, False)

    def take(tree, index):
        def take_leaf(path, leaf):
            name, leaf = leaf_name(path), _view(leaf)[index]
            if name in PROJECTIONS[:3]:  # [D, N, H] -> [D, N*H]
                leaf = leaf.reshape(len(leaf), -1)
            elif name in PROJECTIONS:  # [N, H, D] -> [N*H, D]
                leaf = leaf.reshape(-1, leaf.shape[-1])
            leaf = jax.device_put(leaf, may_alias=True)
            is_matrix = name in PROJECTIONS or name.split(".")[-1] in (*MATRICES, "a", "b")
            return matrix(leaf) if is_matrix else leaf

        return jax.tree_util.tree_map_with_path(take_leaf, tree)

    full, low_rank = experts.of_layers().feed_forward, None
    if isinstance(full, MixedFeedForward):
        full, low_rank = full.full, full.low_rank
    assert isinstance(full, FeedForward)
    count = full.gate.shape[1]

    def networks_of(index):
        own = [take(full, (index, slice(e, e + 1))) for e in range(count)]
        if low_rank is not None:  # one stack, which shares the public expert's matrices
            own.append(take(low_rank, index).with_base(own[0]))
        return tuple(own)

    layers = tuple(
        UnstackedLayer(take(backbone.layers, i), take(experts.router, i), networks_of(i))
        for i in range(config.num_layers)
    )
    return Unstacked(layers, matrix(backbone.head_matrix(config)))


def _view(leaf: jax.Array) -> jax.Array | np.ndarray:
    """On a CPU, an array whose slices are no copies."""
    return np.asarray(leaf) if jax.default_backend() == "cpu" else leaf


def round_to_int8(backbone: Backbone, experts: Experts) -> tuple[Backbone, Experts]:
    """The stacks with every number rounded as `unstack(..., int8=True)` rounds it.

    Norms, router rows and the embedding are not rounded, nor is a head that is tied to it.
    """

    def round_leaf(path, leaf):
        name = leaf_name(path)
        if name.endswith(PROJECTIONS[:3]):  # [L, D, N, H]
            return round_matrix(leaf.reshape(*leaf.shape[:2], -1)).reshape(leaf.shape)
        if name.endswith(PROJECTIONS[3]):  # [L, N, H, D]
            return round_matrix(leaf.reshape(len(leaf), -1, leaf.shape[-1])).reshape(leaf.shape)
        return round_matrix(leaf) if "feed_forward" in name or name.endswith("head") else leaf

    return jax.jit(functools.partial(jax.tree_util.tree_map_with_path, round_leaf))(
        (backbone, experts)
    )
