"""An owner fits its own router rows: linear classifiers of its tokens against public tokens.

This is not in the paper. Rows that are trained on the owner's text alone detect a direction common
to all text, and drown each other out after the merge. Here each row separates the owner's tokens
from public tokens, so that rows of different owners are comparable: the public row is their common
zero. Nothing of other owners is used.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.modeling.attention import segment_positions
from flexolmo_jax.modeling.experts import Experts, moe, with_base
from flexolmo_jax.modeling.transformer import Anchor

SHRINKAGE = 1e-2  # of covariances towards a multiple of the identity


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
    """Fits the rows and biases of one expert, layer by layer, in a model of two experts.

    Args:
      anchor, config: the frozen anchor.
      expert: the owner's trained expert (a stack of one); its rows are replaced.
      own, public: a batch of the owner's text, and one of public text.
      router: "logistic" regression (`separate`), or linear discriminant "lda" (`discriminate`).
      ridge: of `separate`: penalty on the whitened row's squared norm, relative to the mean loss.
      prior: probability that a token is the owner's; 0.5 weights both texts equally.

    Returns:
      the expert with rows [L, 1, D] and biases [L, 1] <= 0, float32.
    """
    pair = dataclasses.replace(config, num_experts=2, remat="none")
    tokens = jnp.concatenate([own.tokens, public.tokens])
    segments = jnp.concatenate([own.segments, public.segments])
    real = np.asarray(segments).reshape(-1) > 0
    is_own = np.repeat([True, False], [own.tokens.size, public.tokens.size])[real]
    classify = functools.partial(separate, ridge=ridge) if router == "logistic" else discriminate

    x = anchor.backbone.embed[...][tokens].astype(config.dtype)
    computed = with_base(expert, anchor.public)
    rows, biases = [], []
    for layer_index in range(config.num_layers):
        layer, public_slice, own_slice = _layer_of(
            (anchor.backbone.layers, anchor.public, computed), layer_index
        )
        x = _experts_input(x, layer, segments, pair)
        inputs = np.asarray(x, np.float64).reshape(-1, config.width)[real]
        row, bias = classify(inputs, is_own, prior=prior)
        own_slice.router.row[...] = jnp.asarray(row[None], jnp.float32)
        own_slice.router.bias[...] = jnp.asarray([bias], jnp.float32)
        x = _add_experts(x, layer, (public_slice, own_slice), pair)
        rows.append(own_slice.router.row[...])
        biases.append(own_slice.router.bias[...])
    # The fitted logits are relative to the public expert's, so its row (often 0) is added.
    expert.router.row[...] = jnp.stack(rows) + anchor.public.router.row[...]
    expert.router.bias[...] = jnp.stack(biases)
    return expert


@jax.jit
def _layer_of(stacks: Any, layer: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[layer], stacks)


@functools.partial(jax.jit, static_argnames="pair")
def _experts_input(x, layer, segments, pair: ModelConfig):
    out, _ = layer.attention(x, segment_positions(segments), segments, pair)
    return x + layer.attention_norm(out, pair.norm_eps)


@functools.partial(jax.jit, static_argnames="pair")
def _add_experts(x, layer, stacks, pair: ModelConfig):
    out, *_ = moe(x, stacks, jnp.ones((len(x), 2), bool), pair)
    return x + layer.experts_norm(out, pair.norm_eps)


def separate(
    inputs: np.ndarray, is_own: np.ndarray, *, ridge: float, prior: float
) -> tuple[np.ndarray, float]:
    """Fits r.x + b to the log odds that x is the owner's, by logistic regression.

    A positive intercept is folded into the row (`Whitening.constant`).

    Args:
      inputs: float64 [T, D], the inputs of a layer's experts.
      is_own: bool [T].
      ridge, prior: as in `fit_router`.

    Returns:
      the row r, float64 [D], and the bias b <= 0.
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
    """As `separate`, in closed form, for Gaussian inputs with equal covariances.

    If all owners had the same covariance, fitting each owner against the same public text would
    give the same discriminants as fitting all owners together.
    """
    own, public = inputs[is_own], inputs[~is_own]
    pooled = (np.cov(own, rowvar=False) + np.cov(public, rowvar=False)) / 2
    whitening = Whitening.of(public.mean(axis=0), pooled)
    white = whitening.whitened(own.mean(axis=0)[None])[0]
    return whitening.row(white, -float(white @ white) / 2 + np.log(prior / (1 - prior)))


class Whitening(NamedTuple):
    """Coordinates in which the public inputs of a layer's experts have mean 0 and covariance 1."""

    mean: np.ndarray  # float64 [D]
    covariance: np.ndarray  # float64 [D, D], shrunk
    factor: np.ndarray  # float64 [D, D], lower triangular: covariance = factor factor'

    @classmethod
    def of(cls, mean: np.ndarray, covariance: np.ndarray) -> "Whitening":
        """From the mean and covariance of public inputs."""
        width = len(mean)
        shrunk = covariance + SHRINKAGE * np.trace(covariance) / width * np.eye(width)
        return cls(mean, shrunk, np.linalg.cholesky(shrunk))

    def whitened(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs in these coordinates: [T, D] -> [T, D]."""
        return np.linalg.solve(self.factor, (inputs - self.mean).T).T

    @property
    def constant(self) -> np.ndarray:
        """The row v whose logit v.x is about 1 for every input: float64 [D].

        v = S^-1 m / (m' S^-1 m), with the public mean m and covariance S: of all rows with
        v.m = 1, its logits have the smallest variance. Adding c*v to a row adds about c to each of
        its logits.
        """
        direction = np.linalg.solve(self.covariance, self.mean)
        return direction / (self.mean @ direction)

    def row(self, white: np.ndarray, intercept: float) -> tuple[np.ndarray, float]:
        """The row and bias <= 0 of the score white.z + intercept in these coordinates.

        A positive bias is folded into the row (`constant`).
        """
        row = np.linalg.solve(self.factor.T, white)
        bias = float(intercept - row @ self.mean)
        if bias > 0:
            row, bias = row + bias * self.constant, 0.0
        return row, bias
