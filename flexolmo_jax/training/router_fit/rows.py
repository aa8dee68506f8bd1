"""An owner fits its own router rows: a linear classifier of its tokens against public ones.

Not in the paper. Rows that are learned on the owner's text alone become detectors of a direction
common to all text, and swamp each other after the merge; here each row separates the owner's
tokens from public ones, so rows fitted apart are comparable: the public row is their common zero.
Nothing of other owners is used.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.modeling.attention import segment_positions
from flexolmo_jax.modeling.experts import Experts, moe
from flexolmo_jax.modeling.transformer import Anchor

SHRINKAGE = 1e-2  # of the public covariance towards a multiple of the identity


def fit_router(
    anchor: Anchor,
    expert: Experts,
    own: Batch,
    public: Batch,
    config: ModelConfig,
    *,
    router: Literal["logistic", "lda"],
    ridge: float,
    prior: float,
) -> Experts:
    """Fits the rows and biases of one expert, layer by layer in its own two-expert model.

    Args:
      anchor: the frozen anchor.
      expert: the owner's trained expert (a stack of one); its rows are replaced.
      own: a batch of the owner's text.
      public: a batch of public text.
      config: of the anchor.
      router: by logistic regression (`separate`), or as a linear discriminant (`discriminate`).
      ridge: of `separate`: penalty on the squared length of the whitened row, relative to the
        mean loss.
      prior: share of all text that is taken to be the owner's; 0.5 weighs both sides alike.

    Returns:
      the expert with rows [L, 1, D] and biases [L, 1] <= 0, float32.
    """
    pair = dataclasses.replace(config, num_experts=2, remat="none")
    tokens = jnp.concatenate([own.tokens, public.tokens])
    segments = jnp.concatenate([own.segments, public.segments])
    positions = segment_positions(segments)
    real = np.asarray(segments).reshape(-1) > 0
    is_own = np.repeat([True, False], [own.tokens.size, public.tokens.size])[real]
    everyone = jnp.ones((len(tokens), 2), bool)

    @jax.jit
    def experts_input(x, layer):
        out, _ = layer.attention(x, positions, segments, pair)
        return x + layer.attention_norm(out, pair.norm_eps)

    @jax.jit
    def add_experts(x, layer, stacks):
        out, *_ = moe(x, stacks, everyone, pair)
        return x + layer.experts_norm(out, pair.norm_eps)

    x = anchor.backbone.embed[...][tokens].astype(config.dtype)
    rows, biases = [], []
    for number in range(config.num_layers):
        layer, public_slice, own_slice = jax.tree.map(
            lambda leaf, number=number: leaf[number],
            (anchor.backbone.layers, anchor.public, expert),
        )
        x = experts_input(x, layer)
        inputs = np.asarray(x, np.float64).reshape(-1, config.width)[real]
        if router == "lda":
            row, bias = discriminate(inputs, is_own, prior=prior)
        else:
            row, bias = separate(inputs, is_own, ridge=ridge, prior=prior)
        own_slice.router.row[...] = jnp.asarray(row[None], jnp.float32)
        own_slice.router.bias[...] = jnp.asarray([bias], jnp.float32)
        x = add_experts(x, layer, (public_slice, own_slice))
        rows.append(own_slice.router.row[...])
        biases.append(own_slice.router.bias[...])
    # The logits are differences from the public expert's: add its row where it is not zero.
    expert.router.row[...] = jnp.stack(rows) + anchor.public.router.row[...]
    expert.router.bias[...] = jnp.stack(biases)
    return expert


def separate(
    inputs: np.ndarray, is_own: np.ndarray, *, ridge: float, prior: float
) -> tuple[np.ndarray, float]:
    """The row r and bias b <= 0 with r.x + b the log odds that x is the owner's.

    A positive intercept is folded into the row (`Whitening.constant`).

    Args:
      inputs: float64 [T, D], the inputs of a layer's experts.
      is_own: bool [T].
      ridge, prior: as in `fit_router`.
    """
    public = Whitening.of(inputs[~is_own].mean(axis=0), np.cov(inputs[~is_own], rowvar=False))
    white = public.whitened(inputs)
    share = is_own.mean()
    weights = {True: prior / share, False: (1 - prior) / (1 - share)}
    model = LogisticRegression(C=1.0 / (ridge * len(white)), class_weight=weights, max_iter=1000)
    model.fit(white, is_own)
    return public.row(model.coef_[0], float(model.intercept_[0]))


def discriminate(
    inputs: np.ndarray, is_own: np.ndarray, *, prior: float
) -> tuple[np.ndarray, float]:
    """As `separate`, if both kinds of text were Gaussian with one covariance.

    Closed form. Discriminants that owners fit apart, each against the same public text, would be
    those of all fitted together if the covariance were common to all.
    """
    own, public = inputs[is_own], inputs[~is_own]
    pooled = (np.cov(own, rowvar=False) + np.cov(public, rowvar=False)) / 2
    whitening = Whitening.of(public.mean(axis=0), pooled)
    white = whitening.whitened(own.mean(axis=0)[None])[0]
    return whitening.row(white, -float(white @ white) / 2 + np.log(prior / (1 - prior)))


class Whitening(NamedTuple):
    """Coordinates in which public inputs of a layer's experts have mean 0 and covariance 1."""

    mean: np.ndarray  # float64 [D]
    covariance: np.ndarray  # float64 [D, D], shrunk
    factor: np.ndarray  # float64 [D, D], lower triangular: covariance = factor factor'

    @classmethod
    def of(cls, mean: np.ndarray, covariance: np.ndarray) -> "Whitening":
        """Of the mean and covariance of public inputs."""
        width = len(mean)
        shrunk = covariance + SHRINKAGE * np.trace(covariance) / width * np.eye(width)
        return cls(mean, shrunk, np.linalg.cholesky(shrunk))

    def whitened(self, inputs: np.ndarray) -> np.ndarray:
        """[T, D] -> [T, D]."""
        return np.linalg.solve(self.factor, (inputs - self.mean).T).T

    @property
    def constant(self) -> np.ndarray:
        """The row that is about 1 for every input: float64 [D].

        v = S^-1 m / (m' S^-1 m), of the public mean m and covariance S: v.m = 1, and of all such
        rows it varies least. Adding c*v to a row adds about c to its every logit.
        """
        direction = np.linalg.solve(self.covariance, self.mean)
        return direction / (self.mean @ direction)

    def row(self, white: np.ndarray, intercept: float) -> tuple[np.ndarray, float]:
        """The row and bias <= 0 of a score that is white.z + intercept in these coordinates.

        A positive bias is folded into the row, as `separate` says.
        """
        row = np.linalg.solve(self.factor.T, white)
        bias = float(intercept - row @ self.mean)
        if bias > 0:
            row, bias = row + bias * self.constant, 0.0
        return row, bias
