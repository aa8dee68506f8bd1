"""The inputs of every layer's experts, in the anchor alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.modeling.attention import segment_positions
from flexolmo_jax.modeling.transformer import Anchor
from flexolmo_jax.training.router_fit.rows import Whitening


def whitened_by(public: Batch, anchor: Anchor, config: ModelConfig) -> list[Whitening]:
    """The coordinates of each layer in which public inputs have mean 0 and covariance 1.

    Args:
      public: a batch of public text, [B, S].
      anchor: the frozen anchor.
      config: of the anchor.
    """
    statistics = jax.jit(_mean_and_covariance, static_argnames="config")
    found = statistics(public, anchor, config=of_the_anchor(config))
    means, covariances = (np.asarray(x, np.float64) for x in found)
    return [Whitening.of(*pair) for pair in zip(means, covariances, strict=True)]


def _mean_and_covariance(batch: Batch, anchor: Anchor, config: ModelConfig):
    real = (batch.segments > 0)[..., None]

    def mean_and_covariance(x):
        mean = mean_of(x, real)
        centred = jnp.where(real, x - mean, 0)
        return mean, jnp.einsum("BSd,BSe->de", centred, centred) / jnp.sum(real)

    return inputs_of_layers(batch, anchor, config, mean_and_covariance)


def mean_of(x: jax.Array, real: jax.Array) -> jax.Array:
    """The mean of x [B, S, D] over the tokens that are `real`, bool [B, S, 1] -> [D]."""
    return jnp.sum(jnp.where(real, x, 0), axis=(0, 1)) / jnp.maximum(jnp.sum(real), 1)


def inputs_of_layers(batch: Batch, anchor: Anchor, config: ModelConfig, statistic: Callable) -> Any:
    """statistic(x) of the inputs x of every layer's experts, float32 [B, S, D], stacked."""
    positions = segment_positions(batch.segments)
    everyone = jnp.ones((len(batch.tokens), 1), bool)

    def step(x, slices):
        layer, public = slices
        out = layer(x, (public,), positions, batch.segments, everyone, config)
        return out.x, statistic(out.experts_input.astype(jnp.float32))

    x = anchor.backbone.embed[...][batch.tokens].astype(config.dtype)
    return jax.lax.scan(step, x, (anchor.backbone.layers, anchor.public.of_layers()))[1]


def of_the_anchor(config: ModelConfig) -> ModelConfig:
    """The config of the anchor alone."""
    return dataclasses.replace(config, num_experts=1, remat="none", expert_compute="dense")
