"""Everything that moves between devices inside `placement.shard_map`.

Code inside sees its own device's sequences and its own shard of each matrix, and is otherwise the
code that a single device runs: outside of a shard_map these functions do nothing. So the compiled
program communicates where this file says, and nowhere else.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.parallel.mesh import (
    ALL_AXES,
    AXES,
    DATA,
    EXPERT,
    SHARDED,
    TENSOR,
    matrix_name,
)

GATHERED = "gathered"  # checkpoint name of all-gathered matrices: backward gathers them again


def inside_shard_map() -> bool:
    """Whether this is traced inside of `placement.shard_map`."""
    return ALL_AXES == jax.sharding.get_abstract_mesh().manual_axes


def platform() -> str:
    """The platform that the program is compiled for (cpu, gpu, tpu), even if it is not present."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def psum_batch(tree: Any) -> Any:
    """The sum over all devices that hold sequences."""
    return jax.lax.psum(tree, AXES) if inside_shard_map() else tree


def all_gather_batch(x: jax.Array, axis: int = 0) -> jax.Array:
    """The whole batch, of which each device holds some sequences along an axis."""
    return jax.lax.all_gather(x, AXES, axis=axis, tiled=True) if inside_shard_map() else x


def first_sequence(sequences: int) -> jax.Array | int:
    """The index in the whole batch of this device's first sequence, of `sequences` per device."""
    return jax.lax.axis_index(AXES) * sequences if inside_shard_map() else 0


def all_gather_module(module: Any, config: ModelConfig, expert_parallel: bool = False) -> Any:
    """A module of one layer with its matrices all-gathered.

    Args:
      module: of one layer.
      config: the sizes, and the dtype in which matrices travel.
      expert_parallel: whether its experts stay on their devices.
    """
    if not inside_shard_map():
        return module

    def gather(path, leaf):
        name = matrix_name(path)
        if name not in SHARDED:
            return leaf
        return all_gather_matrix(name, leaf, config, expert_parallel)

    return jax.tree_util.tree_map_with_path(gather, module)


def all_gather_matrix(
    name: str, leaf: jax.Array, config: ModelConfig, expert_parallel: bool = False
) -> jax.Array:
    """A matrix by its name, all-gathered; the gradient is a reduce-scatter."""
    if not inside_shard_map():
        return leaf
    size, shard = config.width, leaf.shape[SHARDED[name].batch]
    if name == "down":
        size = config.ffn_width // jax.lax.axis_size(TENSOR)
    if SHARDED[name].tensor is None:  # the head: each device works on its own positions
        leaf = copy_to_tensor_parallel(leaf)
    if shard == size:
        return leaf
    axes: tuple[str, ...] = AXES
    if expert_parallel:
        axes = (DATA,)
    elif size // shard != jax.lax.axis_size(AXES):
        axes = (EXPERT,)
    axis = leaf.ndim + SHARDED[name].batch
    leaf = jax.lax.all_gather(leaf.astype(config.dtype), axes, axis=axis, tiled=True)
    return checkpoint_name(leaf, GATHERED)


def is_expert_parallel(network: Any, count: int) -> bool:
    """Whether other devices hold some of a layer's experts.

    Args:
      network: of one layer, with `experts_here`.
      count: the experts of all devices, without those that pad the stack.
    """
    return inside_shard_map() and network.experts_here < count


def embedding_lookup(embed: jax.Array, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """embed[tokens] in the dtype of the activations, [V, D] and [B, S] -> [B, S, D].

    Each device looks up its shard of the width for all sequences and sends the result to the
    devices of the sequences: activations travel, and the gradient never has the table's size.
    """
    if not inside_shard_map() or embed.shape[-1] == config.width:
        return embed[tokens].astype(config.dtype)
    all_tokens = jax.lax.all_gather(tokens, AXES, tiled=True)
    slices = embed[all_tokens].astype(config.dtype)
    return jax.lax.all_to_all(slices, AXES, split_axis=0, concat_axis=2, tiled=True)


def dispatch_to_experts(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Expert parallelism, forward: [B, S, D], [E, B, S] -> all sequences, this device's experts.

    Experts that pad the stack, of which there may be no weights here, get weights 0.
    """
    missing = -len(weights) % jax.lax.axis_size(EXPERT)
    weights = jnp.pad(weights, ((0, missing), (0, 0), (0, 0)))
    x = jax.lax.all_gather(x, EXPERT, tiled=True)
    return x, jax.lax.all_to_all(weights, EXPERT, split_axis=0, concat_axis=1, tiled=True)


def combine_from_experts(out: jax.Array) -> jax.Array:
    """Expert parallelism, back: the sum of all experts' outputs, for this device's sequences."""
    return jax.lax.psum_scatter(out, EXPERT, tiled=True)


def to_whole_matrices(x: jax.Array, cut: dict[int, tuple[str, ...]]) -> jax.Array:
    """Matrices of which every device holds a shard -> the whole matrices of this device's share.

    Args:
      x: [M, ...], this device's shards of M matrices.
      cut: the axes of the mesh over which each axis of `x` is sharded, by its number.

    Returns:
      [M', ...]: M is padded with zeros until the devices can divide it.
    """
    devices = math.prod(jax.lax.axis_size(axes) for axes in cut.values())
    x = jnp.pad(x, ((0, -len(x) % devices), *((0, 0),) * (x.ndim - 1)))
    for axis, axes in cut.items():
        x = jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=axis, tiled=True)
    return x


def from_whole_matrices(x: jax.Array, cut: dict[int, tuple[str, ...]]) -> jax.Array:
    """The inverse of `to_whole_matrices`, with the padding at the end."""
    for axis, axes in reversed(cut.items()):
        x = jax.lax.all_to_all(x, axes, split_axis=axis, concat_axis=0, tiled=True)
    return x


# Tensor parallelism. Devices along `tensor` hold the same activations; each computes a summand of a
# layer's output from its share of the heads or hidden units, and, in the backward pass, a summand
# of the gradient of what all of them hold.


def is_tensor_parallel() -> bool:
    """Whether this device holds only a share of every layer's heads and hidden units."""
    return inside_shard_map() and jax.lax.axis_size(TENSOR) > 1


def copy_to_tensor_parallel(tree: Any) -> Any:
    """Identity forward, psum over `tensor` backward."""
    return jax.tree.map(_copy_to_tensor_parallel, tree) if is_tensor_parallel() else tree


def reduce_from_tensor_parallel(tree: Any) -> Any:
    """psum over `tensor` forward, identity backward."""
    return jax.tree.map(_reduce_from_tensor_parallel, tree) if is_tensor_parallel() else tree


def split_positions(x: jax.Array) -> jax.Array:
    """This device's share of the positions: [B, S, ...] -> [B, S / tensor, ...]."""
    return _split_positions(x) if is_tensor_parallel() else x


@jax.custom_vjp
def _copy_to_tensor_parallel(x):
    return x


_copy_to_tensor_parallel.defvjp(lambda x: (x, None), lambda _, d: (jax.lax.psum(d, TENSOR),))


@jax.custom_vjp
def _reduce_from_tensor_parallel(x):
    return jax.lax.psum(x, TENSOR)


_reduce_from_tensor_parallel.defvjp(lambda x: (jax.lax.psum(x, TENSOR), None), lambda _, d: (d,))


@jax.custom_vjp
def _split_positions(x):
    size = x.shape[1] // jax.lax.axis_size(TENSOR)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TENSOR) * size, size, axis=1)


_split_positions.defvjp(
    lambda x: (_split_positions(x), None),
    lambda _, d: (jax.lax.all_gather(d, TENSOR, axis=1, tiled=True),),
)


def local_heads(scale: jax.Array, heads: int) -> jax.Array:
    """This device's `heads` rows of the scales of all heads [N, H]."""
    first = jax.lax.axis_index(TENSOR) * heads
    return jax.lax.dynamic_slice_in_dim(copy_to_tensor_parallel(scale), first, heads)


def local_hidden_units(x: jax.Array, size: int, axis: int) -> jax.Array:
    """This device's `size` of the hidden units of all devices, along an axis of x."""
    if not is_tensor_parallel():
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TENSOR) * size, size, axis)


def pmean_tensor(x: jax.Array) -> jax.Array:
    """The mean over `tensor`, which each device then uses for its own share."""
    return jax.lax.pmean(x, TENSOR)
