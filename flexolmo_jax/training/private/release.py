"""Router rows of a private expert: fitted to one noisy release of statistics of its text.

`router_fit/rows.py` reads every token of the owner's text. Here the only thing that depends on the
text is one sum over units, clipped and noised: each unit contributes the mean input of every
layer's experts, in the anchor alone, in coordinates in which public inputs have mean 0 and
covariance 1. From the noisy mean m follows the row of a linear discriminant with the public
covariance,

    m.z - |m|^2 / 2 + log(prior / (1 - prior)),

and everything else comes from public text or from the release.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.data.units import Units
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Anchor
from flexolmo_jax.privacy.mechanism import Clipping, clipped_sum, with_noise
from flexolmo_jax.training.router_fit.inputs import (
    inputs_of_layers,
    mean_of,
    of_the_anchor,
    whitened_by,
)
from flexolmo_jax.training.router_fit.rows import Whitening

CLIP_QUANTILE = 0.9  # share of public documents whose statistic is not clipped
MAX_UNITS_PER_CALL = 64  # of the pass over all units


class Release(NamedTuple):
    """The published statistics of the owner's text.

    Attributes:
      mean: float32 [L, D], the noisy mean over units, in whitened coordinates.
      noise: standard deviation of the noise on each coordinate of the mean.
      clip: the norm to which each unit's [L, D] was clipped; chosen on public text.
    """

    mean: np.ndarray
    noise: float
    clip: float


class Public(NamedTuple):
    """Statistics of public text: the whitened coordinates, and the norm to clip to."""

    whitenings: list[Whitening]
    clip: float


def public_statistics(
    public: tuple[np.ndarray, np.ndarray], anchor: Anchor, config: ModelConfig
) -> Public:
    """Whitens each layer's inputs by public text, and measures the norms of public documents.

    Args:
      public: tokens and segments (`public_units`).
      anchor: the frozen anchor.
      config: of the anchor.
    """
    units = Batch.of(*public)
    windows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), units)
    whitenings = whitened_by(windows, anchor, config)
    anchor_config = of_the_anchor(config)
    coordinates = _coordinates(whitenings)
    means = jax.jit(
        lambda units: jax.lax.map(
            lambda unit: unit_mean(unit, anchor, coordinates, anchor_config), units
        )
    )
    norms = np.linalg.norm(np.asarray(means(units)).reshape(len(public[0]), -1), axis=1)
    return Public(whitenings, float(np.quantile(norms, CLIP_QUANTILE)))


def clipped_total(
    anchor: Anchor, units: Units, public: Public, config: ModelConfig, generator: Any,
    *, max_windows: int, microbatch_size: int,
) -> jax.Array:  # fmt: skip
    """The sum over all units of their whitened means, each clipped to norm 1; NOT yet noised.

    Removing the text of any one unit changes it by at most 1 in norm.

    Args:
      anchor: the frozen anchor.
      units: of the owner's text.
      public: statistics of public text.
      config: of the anchor.
      generator: draws the windows of units that have more than `max_windows`.
      max_windows: W, windows per unit.
      microbatch_size: units that a device processes at the same time.

    Returns:
      float32 [L, D].
    """
    coordinates, anchor_config = _coordinates(public.whitenings), of_the_anchor(config)
    clip = Clipping(public.clip, microbatch_size)

    @jax.jit
    def add(total, batch):
        is_empty = ~jnp.any(batch.weights > 0, axis=(1, 2))
        statistic = functools.partial(unit_mean, config=anchor_config)
        return total + clipped_sum(statistic, clip, batch, is_empty, anchor, coordinates)

    total = jnp.zeros((config.num_layers, config.width), jnp.float32)
    count = -(-MAX_UNITS_PER_CALL // microbatch_size) * microbatch_size
    for first in range(0, len(units), count):
        indices = range(first, min(first + count, len(units)))
        total = add(total, units.batch(indices, (count, max_windows), generator))
    return total


def release(
    total: jax.Array, clip: float, units: int, noise_multiplier: float, key: jax.Array
) -> Release:
    """The noisy mean of a clipped total: the Gaussian mechanism, once."""
    mean = with_noise(total, noise_multiplier, key) * (clip / units)
    return Release(np.asarray(mean), noise_multiplier * clip / units, clip)


def rows_of(
    released: Release, whitenings: Sequence[Whitening], prior: float
) -> tuple[np.ndarray, np.ndarray]:
    """The rows [L, D] and biases [L] <= 0 that follow from a release.

    Noise of a known size adds to the squared norm of each layer's mean. The mean is shrunk by
    that share (James and Stein), to 0 if all of it may be noise.

    Args:
      released: the statistics of the owner's text.
      whitenings: of each layer.
      prior: probability that a token is the owner's.
    """
    rows, biases = [], []
    for mean, whitening in zip(np.asarray(released.mean, np.float64), whitenings, strict=True):
        squared = float(mean @ mean)
        factor = max(0.0, 1.0 - len(mean) * released.noise**2 / squared) if squared else 0.0
        white = factor * mean
        row, bias = whitening.row(white, -float(white @ white) / 2 + np.log(prior / (1 - prior)))
        rows.append(row)
        biases.append(bias)
    return np.stack(rows), np.asarray(biases)


def with_rows(expert: Experts, rows: np.ndarray, biases: np.ndarray) -> Experts:
    """Adds `rows` to the expert's rows, which are the public expert's, and sets its biases."""
    expert.router.row[...] = jnp.asarray(rows[:, None], jnp.float32) + expert.router.row[...]
    expert.router.bias[...] = jnp.asarray(biases[:, None], jnp.float32)
    return expert


def unit_mean(
    unit: Batch, anchor: Anchor, coordinates: tuple[jax.Array, jax.Array], config: ModelConfig
) -> jax.Array:
    """The mean over a unit's tokens of every layer's whitened inputs.

    Args:
      unit: [W, S] of each.
      anchor: the frozen anchor.
      coordinates: float32 mean [L, D] and matrix [L, D, D] of z = matrix (x - mean).
      config: of the anchor (`of_the_anchor`).

    Returns:
      float32 [L, D].
    """
    real = (unit.segments > 0)[..., None]
    means = inputs_of_layers(unit, anchor, config, lambda x: mean_of(x, real))
    return jnp.einsum("Lde,Le->Ld", coordinates[1], means - coordinates[0])


def _coordinates(whitenings: Sequence[Whitening]) -> tuple[jax.Array, jax.Array]:
    means = np.stack([w.mean for w in whitenings])
    matrices = np.stack([np.linalg.inv(w.factor) for w in whitenings])
    return jnp.asarray(means, jnp.float32), jnp.asarray(matrices, jnp.float32)
