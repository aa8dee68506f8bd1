"""Narrow experts: feed-forward networks with fewer hidden units than the public one (prune.py)."""

from typing import Any

import jax
import jax.numpy as jnp

from flexolmo_jax.storage.on_disk import Widened


def widened(network: Any, public: Any) -> Any:
    """A `FeedForward` with units of zeros up to the public one's width; they add exactly 0.

    Args:
      network: leaves [L, E, ...], in memory or on disk; those in files are read in slices.
      public: with the width; a `FeedForward` too.
    """

    def widen(leaf, like):
        shape = (*leaf.shape[:2], *like.shape[2:])
        if tuple(leaf.shape) == shape:
            return leaf
        if not isinstance(leaf, jax.Array):
            return Widened(leaf, shape)
        return jnp.pad(leaf, [(0, more - own) for own, more in zip(leaf.shape, shape, strict=True)])

    return jax.tree.map(widen, network, public)
