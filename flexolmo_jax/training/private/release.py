"""Router rows of a private expert: fitted to one noisy release of what its text looks like.

`router_fit.py` looks at every token of the owner's text. Here all that is known of it is one sum
over units, clipped and noised: of each unit, the mean input of every layer's experts, in the
anchor alone, in coordinates in which public inputs have mean 0 and covariance 1. From the noisy
mean m the row is that of a linear discriminant with the public covariance,

    m.z - |m|^2 / 2 + log(prior / (1 - prior)),

which needs nothing else of the owner's. The rest is of public text, or follows from the release.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.data.sources import Document
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.units import Units
from flexolmo_jax.data.windows import tokenized, windows
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

CLIP_QUANTILE = 0.9  # of public documents that are shorter than what units are clipped to
AT_ONCE = 64  # units that are read together


class Release(NamedTuple):
    """What is known of the owner's text.

    Attributes:
      mean: float32 [L, D], the noisy mean over units, in whitened coordinates.
      noise: standard deviation of the noise on each coordinate of it.
      clip: the length to which a unit's [L, D] was clipped; from public text.
    """

    mean: np.ndarray
    noise: float
    clip: float


class Public(NamedTuple):
    """What public text says: the coordinates, and the length to clip to."""

    whitenings: list[Whitening]
    clip: float


def units_of_public(
    texts: Iterable[str], tokenizer: Tokenizer, *, length: int, most_windows: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Public documents as units, so many as make up `tokens`; no further text is read.

    Args:
      texts: public documents.
      tokenizer: of the anchor.
      length: S, tokens of a window.
      most_windows: W, of each document.
      tokens: how many are wanted.

    Returns:
      tokens and segments, int32 [documents, W, S + 1] each.

    Raises:
      ValueError: there is no text, or one that cannot be given to the model.
    """
    rows: list[np.ndarray] = []
    for text in texts:
        if tokens <= 0:
            break
        cut = windows(tokenized([Document(text, text)], tokenizer), length, tokenizer.separator)
        row = np.zeros((2, most_windows, length + 1), np.int32)
        for place, window in enumerate(itertools.islice(cut, most_windows)):
            row[:, place] = window
        rows.append(row)
        tokens -= int((row[1] > 0).sum())
    if not rows:
        raise ValueError("the public text to fit router rows against is empty; name some more")
    both = np.stack(rows, axis=1)
    return both[0], both[1]


def look_at_public(
    public: tuple[np.ndarray, np.ndarray], anchor: Anchor, config: ModelConfig
) -> Public:
    """Whitens each layer's inputs by public text, and measures how long public documents are.

    Args:
      public: as `units_of_public` gives it.
      anchor: the frozen anchor.
      config: of the anchor.
    """
    units = Batch.of(*public)
    every = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), units)
    whitenings = whitened_by(every, anchor, config)
    one = of_the_anchor(config)
    into = _coordinates(whitenings)
    measure = jax.jit(
        lambda units: jax.lax.map(lambda unit: unit_mean(unit, anchor, into, one), units)
    )
    lengths = np.linalg.norm(np.asarray(measure(units)).reshape(len(public[0]), -1), axis=1)
    return Public(whitenings, float(np.quantile(lengths, CLIP_QUANTILE)))


def clipped_total(
    anchor: Anchor, units: Units, public: Public, config: ModelConfig, generator: Any,
    *, most_windows: int, microbatch_size: int,
) -> jax.Array:  # fmt: skip
    """The sum over all units of their whitened means, each clipped to length 1; NOT yet noised.

    It changes by at most 1 in length if the text of any one unit becomes nothing.

    Returns:
      float32 [L, D].
    """
    into, one = _coordinates(public.whitenings), of_the_anchor(config)
    clip = Clipping(public.clip, microbatch_size)

    @jax.jit
    def add(total, batch):
        is_empty = ~jnp.any(batch.weights > 0, axis=(1, 2))
        statistic = functools.partial(unit_mean, config=one)
        return total + clipped_sum(statistic, clip, batch, is_empty, anchor, into)

    total = jnp.zeros((config.num_layers, config.width), jnp.float32)
    rows = -(-AT_ONCE // microbatch_size) * microbatch_size
    for first in range(0, len(units), rows):
        some = range(first, min(first + rows, len(units)))
        total = add(total, units.batch(some, (rows, most_windows), generator))
    return total


def release(
    total: jax.Array, clip: float, units: int, noise_multiplier: float, key: jax.Array
) -> Release:
    """The noisy mean of a clipped total: the Gaussian mechanism, once."""
    mean = with_noise(total, noise_multiplier, key) * (clip / units)
    return Release(np.asarray(mean), noise_multiplier * clip / units, clip)


def rows_of(
    found: Release, whitenings: Sequence[Whitening], prior: float
) -> tuple[np.ndarray, np.ndarray]:
    """The rows [L, D] and biases [L] <= 0 of a release.

    The squared length of a layer's noisy mean is too long by the noise's own, which is known: the
    mean is shrunk by that share (James and Stein), to 0 where all of it may be noise.
    """
    rows, biases = [], []
    for mean, whitening in zip(np.asarray(found.mean, np.float64), whitenings, strict=True):
        squared = float(mean @ mean)
        kept = max(0.0, 1.0 - len(mean) * found.noise**2 / squared) if squared else 0.0
        white = kept * mean
        row, bias = whitening.row(white, -float(white @ white) / 2 + np.log(prior / (1 - prior)))
        rows.append(row)
        biases.append(bias)
    return np.stack(rows), np.asarray(biases)


def with_rows(expert: Experts, rows: np.ndarray, biases: np.ndarray) -> Experts:
    """The expert, whose rows are the public expert's, with these added to them, and biases."""
    expert.router.row[...] = jnp.asarray(rows[:, None], jnp.float32) + expert.router.row[...]
    expert.router.bias[...] = jnp.asarray(biases[:, None], jnp.float32)
    return expert


def unit_mean(
    unit: Batch, anchor: Anchor, into: tuple[jax.Array, jax.Array], config: ModelConfig
) -> jax.Array:
    """The mean over a unit's tokens of every layer's whitened inputs.

    Args:
      unit: [W, S] of each.
      anchor: the frozen anchor.
      into: float32 [L, D] and [L, D, D]: z = matrix (x - mean).
      config: of the anchor alone.

    Returns:
      float32 [L, D].
    """
    real = (unit.segments > 0)[..., None]
    means = inputs_of_layers(unit, anchor, config, lambda x: mean_of(x, real))
    return jnp.einsum("Lde,Le->Ld", into[1], means - into[0])


def _coordinates(whitenings: Sequence[Whitening]) -> tuple[jax.Array, jax.Array]:
    means = np.stack([w.mean for w in whitenings])
    matrices = np.stack([np.linalg.inv(w.factor) for w in whitenings])
    return jnp.asarray(means, jnp.float32), jnp.asarray(matrices, jnp.float32)
