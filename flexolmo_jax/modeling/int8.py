"""A model whose matrices are 8-bit integers, a scale for each output channel."""

import functools

import jax

from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.kernels.quantized import quantize, round_matrix
from flexolmo_jax.modeling.transformer import Backbone
from flexolmo_jax.parallel import placement
from flexolmo_jax.storage.tensors import leaf_name

PROJECTIONS = tuple(f"attention.{name}" for name in "qkvo")


def to_int8(backbone: Backbone, experts: Experts) -> tuple[Backbone, Experts]:
    """The stacks with projections and feed-forward networks `Quantized`; the rest is float32.

    Norms, router rows, the experts' own heads and the embedding are not rounded, nor is a head that
    is tied to it. Another head stays an array, of rounded numbers, because losses read its columns.

    Args:
      backbone, experts: their leaves may be on the host, or in files: one at a time is read.
    """

    def of_leaf(path, leaf):
        name, leaf = leaf_name(path), placement.device_put(leaf, None, dtype="float32")
        if name.endswith(PROJECTIONS[:3]):  # [L, D, N, H] -> [L, D, N*H]
            return _to_integers(leaf.reshape(*leaf.shape[:2], -1))
        if name.endswith(PROJECTIONS[3]):  # [L, N, H, D] -> [L, N*H, D]
            return _to_integers(leaf.reshape(len(leaf), -1, leaf.shape[-1]))
        if "feed_forward" in name:
            return _to_integers(leaf)
        return _rounded(leaf) if name.endswith("head") else leaf

    return jax.tree_util.tree_map_with_path(of_leaf, (backbone, experts))


_to_integers = jax.jit(functools.partial(quantize, int8=True))
_rounded = jax.jit(round_matrix)
