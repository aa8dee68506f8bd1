"""Weights in the layout that decoding on CPU reads fastest: every matrix is an array of its own.

XLA for CPU copies a slice of a stack before a matmul reads it. An array of the slice's own need not
be a copy: it is a view of the stack's memory, unless the order of its numbers changes. It does in
bfloat16 in a batch of one: XLA's matmul streams a matrix at full memory bandwidth only if the
contracted axis is the last in memory.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.experts import Experts, FeedForward
from flexolmo_jax.modeling.int8 import PROJECTIONS
from flexolmo_jax.modeling.kernels.quantized import Quantized, quantize
from flexolmo_jax.modeling.low_rank import FeedForwardRanks, LowRankGroups, MixedFeedForward
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.modeling.transformer import Backbone, Layer
from flexolmo_jax.storage.tensors import leaf_name

MATRICES = FeedForwardRanks._fields  # gate, up and down


class UnstackedLayer(NamedTuple):
    """The weights of one layer, without the leading axis L."""

    shared: Layer
    router: Router  # of all experts
    networks: tuple[FeedForward | LowRankGroups, ...]  # full ones are stacks of one


class Unstacked(NamedTuple):
    """The weights, layer by layer and expert by expert; matrices are arrays or `Quantized`.

    Low-rank experts stay together, in one stack after the others.
    """

    layers: tuple[UnstackedLayer, ...]
    head: jax.Array | Quantized  # [D, V]


def unstack(
    backbone: Backbone, experts: Experts, config: ModelConfig, transposed: bool, int8: bool = False
) -> Unstacked:
    """Takes the weights out of their stacks; without `transposed` they are not copied.

    Args:
      backbone, experts, config: the model.
      transposed: store matrices with the contracted axis last in memory, for a batch of one.
      int8: the stacks are those of `modeling.int8`.
    """
    convert = jax.jit(functools.partial(quantize, int8=int8))

    def take(tree, index):
        def take_leaf(path, leaf):
            name, leaf = leaf_name(path), _view(leaf)[index]
            if name in PROJECTIONS[:3]:  # [D, N, H] -> [D, N*H]
                leaf = leaf.reshape(len(leaf), -1)
            elif name in PROJECTIONS:  # [N, H, D] -> [N*H, D]
                leaf = leaf.reshape(-1, leaf.shape[-1])
            leaf = jax.device_put(leaf, may_alias=True)
            is_matrix = name in PROJECTIONS or name.split(".")[-1] in (*MATRICES, "a", "b")
            return convert(leaf) if transposed and is_matrix else leaf

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
    head = backbone.head_matrix(config)
    return Unstacked(layers, convert(head) if transposed or int8 else head)


def _view(leaf: jax.Array) -> jax.Array | np.ndarray:
    """On a CPU, an array whose slices are no copies."""
    return np.asarray(leaf) if jax.default_backend() == "cpu" else leaf
