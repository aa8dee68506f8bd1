"""A model whose matrices are 8-bit integers, a scale for each output channel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.kernels.quantized import Quantized, quantize, round_matrix
from flexolmo_jax.modeling.transformer import Backbone
from flexolmo_jax.parallel import placement
from flexolmo_jax.storage.tensors import leaf_name

PROJECTIONS = tuple(f"attention.{name}" for name in "qkvo")


def to_int8(backbone: Backbone, experts: Experts) -> tuple[Backbone, Experts]:
    """The stacks with projections and feed-forward networks `Quantized`; the rest is float32.

    Norms, router rows, the experts' own heads and the embedding are not rounded, nor is a head that
    is tied to it. Another head stays an array, of rounded numbers, because losses read its columns.

    Args:
      backbone, experts: their leaves may be on the host, or in files, and are read layer by layer.
    """

    def of_leaf(path, leaf):
        name = leaf_name(path)
        if name.endswith(PROJECTIONS[:3]):  # [L, D, N, H] -> [L, D, N*H]
            return _to_integers(leaf, (leaf.shape[1], -1))
        if name.endswith(PROJECTIONS[3]):  # [L, N, H, D] -> [L, N*H, D]
            return _to_integers(leaf, (-1, leaf.shape[-1]))
        if "feed_forward" in name:
            return _to_integers(leaf, leaf.shape[1:])
        leaf = placement.device_put(leaf, None, dtype="float32")
        return _rounded(leaf) if name.endswith("head") else leaf

    return jax.tree_util.tree_map_with_path(of_leaf, (backbone, experts))


def _to_integers(leaf: Any, shape: tuple[int, ...]) -> Quantized:
    """[L, ...] -> [L, *shape], rounded; no more than one layer is in memory as floats."""
    rest = (slice(None),) * (leaf.ndim - 1)
    layers = []
    for number in range(leaf.shape[0]):
        layer = leaf[(slice(number, number + 1), *rest)]
        layers.append(_quantized(jnp.asarray(layer, "float32").reshape(1, *shape)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *layers)


_quantized = jax.jit(functools.partial(quantize, int8=True))
_rounded = jax.jit(round_matrix)
