"""What every layer's experts read, in the anchor alone."""

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
    """Of each layer: the coordinates in which public inputs have mean 0 and covariance 1.

    Args:
      public: a batch of public text, [B, S].
      anchor: the frozen anchor.
      config: of the anchor.
    """
    run = jax.jit(_mean_and_covariance, static_argnames="config")
    stats = run(public, anchor, config=of_the_anchor(config))
    means, covariances = (np.asarray(x, np.float64) for x in stats)
    return [Whitening.of(*pair) for pair in zip(means, covariances, strict=True)]


def _mean_and_covariance(batch: Batch, anchor: Anchor, config: ModelConfig):
    real = (batch.segments > 0)[..., None]

    def look(x):
        mean = mean_of(x, real)
        centred = jnp.where(real, x - mean, 0)
        return mean, jnp.einsum("BSd,BSe->de", centred, centred) / jnp.sum(real)

    return inputs_of_layers(batch, anchor, config, look)


def mean_of(x: jax.Array, real: jax.Array) -> jax.Array:
    """The mean over tokens of x, [B, S, D], where `real`, bool [B, S, 1]: [D]."""
    return jnp.sum(jnp.where(real, x, 0), axis=(0, 1)) / jnp.maximum(jnp.sum(real), 1)


def inputs_of_layers(batch: Batch, anchor: Anchor, config: ModelConfig, look: Callable) -> Any:
    """look(x) of the inputs of every layer's experts, float32 [B, S, D], stacked."""
    positions = segment_positions(batch.segments)
    everyone = jnp.ones((len(batch.tokens), 1), bool)

    def step(x, slices):
        layer, public = slices
        out = layer(x, (public,), positions, batch.segments, everyone, config)
        return out.x, look(out.experts_input.astype(jnp.float32))

    x = anchor.backbone.embed[...][batch.tokens].astype(config.dtype)
    return jax.lax.scan(step, x, (anchor.backbone.layers, anchor.public))[1]


def of_the_anchor(config: ModelConfig) -> ModelConfig:
    """The config in which the anchor runs alone."""
    return dataclasses.replace(config, num_experts=1, remat="none", expert_compute="dense")
