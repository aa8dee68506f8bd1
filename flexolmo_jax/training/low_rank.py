"""An expert as the public feed-forward network plus factors of low rank (Hu et al., 2021).

Where noise is added to every trained number, fewer numbers mean less noise: differentially private
training may do with a few thousand what it cannot do with all weights (Yu et al., 2021). In the
package the factors are multiplied out, so that such an expert is like any other.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.loader import Batch
from flexolmo_jax.modeling.experts import FeedForward
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.modeling.transformer import Anchor
from flexolmo_jax.training.step import ExpertAloneLoss


class Factors(NamedTuple):
    """What is added to a matrix [L, E, A, B]: first @ second."""

    first: jax.Array  # [L, E, A, R]
    second: jax.Array  # [L, E, R, B]


def initial_factors(public: FeedForward, rank: int, key: jax.Array) -> list[Factors]:
    """For each matrix of a network, factors whose product is 0; float32.

    `first` is drawn with variance 1/R, so that the gradient of `second` is expected to be as long
    as that of the whole matrix, and clip norm and learning rate mean the same.

    Args:
      public: the network they are added to.
      rank: R.
      key: nothing secret.
    """
    matrices = jax.tree.leaves(public)
    keys = jax.random.split(key, len(matrices))
    return [
        Factors(
            jax.random.normal(one, (*m.shape[:-1], rank)) / rank**0.5,
            jnp.zeros((*m.shape[:-2], rank, m.shape[-1])),
        )
        for one, m in zip(keys, matrices, strict=True)
    ]


def expanded(public: FeedForward, factors: list[Factors]) -> FeedForward:
    """The network with each matrix plus its factors' product, in the network's dtype."""
    matrices, structure = jax.tree.flatten(public)
    pairs = zip(matrices, factors, strict=True)
    return jax.tree.unflatten(
        structure, [m + (f.first @ f.second).astype(m.dtype) for m, f in pairs]
    )


@dataclasses.dataclass(frozen=True)
class LowRankLoss:
    """Stage 2, gate fixed to 1, as `ExpertAloneLoss`, of factors beside the public network."""

    config: ModelConfig
    output_z_loss: float

    def __call__(self, factors: list[Factors], frozen: tuple[Anchor, Router], batch: Batch):
        network = expanded(frozen[0].public.feed_forward, factors)
        return ExpertAloneLoss(self.config, self.output_z_loss)(network, frozen, batch)
