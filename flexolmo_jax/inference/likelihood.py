"""Logits; and log-likelihoods of given tokens, without all positions' logits in memory at once."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.inference.continuations import checked_tokens
from flexolmo_jax.inference.sampling import Sampling, candidates, likeliest
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone, forward, output_logits
from flexolmo_jax.parallel import placement
from flexolmo_jax.parallel.mesh import BATCH, specs_of

CHUNK_POSITIONS = 512  # of a batch whose logits are in memory at a time


def checked(
    tokens: np.ndarray, targets: np.ndarray | None, lengths: np.ndarray | None, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, lengths and targets for `log_likelihoods`.

    Without targets, they are every token but the first; without lengths, nothing is padding.

    Raises:
      ValueError: as `checked_tokens`.
    """
    tokens = checked_tokens(tokens, vocabulary)
    if targets is None:
        tokens, targets = checked_tokens(tokens[:, :-1], vocabulary), tokens[:, 1:, None]
    targets = np.asarray(targets, np.int32)
    if targets.max() >= vocabulary:
        checked_tokens(targets.max().reshape(1, 1), vocabulary)
    if lengths is None:
        lengths = np.full(len(tokens), tokens.shape[1], np.int32)
    return tokens, lengths, targets


class LogLikelihoods(NamedTuple):
    log_probabilities: Float[Array, "B C k"]  # float32; 0 where there is no target
    is_greedy: Bool[Array, "B C k"]  # the target is the likeliest token, or there is none


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def logits(
    backbone: Backbone,
    experts: Experts,
    tokens: Int[Array, "B S"],
    allowed: Bool[Array, "B E"],
    config: ModelConfig,
    mesh: Mesh | None,
) -> Float[Array, "B S V"]:
    """The logits after every token; arguments as in `log_likelihoods`."""

    def local(backbone, experts, tokens, allowed):
        out = forward(backbone, (experts,), jnp.asarray(tokens), config, allowed=allowed)
        return output_logits(backbone, (experts,), out.hidden, out.weights, config)

    weights, rows = (backbone, experts), BATCH
    where = mesh and (*specs_of(weights, mesh), rows, rows)
    return placement.shard_map(local, mesh, where, rows)(*weights, tokens, allowed)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "sampling"))
def log_likelihoods(
    backbone: Backbone,
    experts: Experts,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    targets: Int[Array, "B C k"],
    allowed: Bool[Array, "B E"],
    config: ModelConfig,
    mesh: Mesh | None,
    sampling: Sampling | None = None,
) -> LogLikelihoods:
    """Scores candidates for the tokens that follow each of the last C positions.

    Args:
      backbone, experts, config, mesh: the model.
      tokens: padded on the right, where no position before attends to it.
      lengths: of the sequences, without the padding.
      targets: k candidates for the token after each of the last C positions; -1 is none.
      allowed: the experts that each sequence may use.
      sampling: score under this truncated distribution, in which a log-probability may be -inf;
        None: under the model's own.
    """

    def local(backbone, experts, tokens, lengths, targets, allowed):
        out = forward(backbone, (experts,), tokens, config, allowed=allowed)
        count = targets.shape[1]
        positions = jnp.maximum(lengths[:, None] + jnp.arange(-count, 0), 0)
        hidden = jnp.take_along_axis(out.hidden, positions[..., None], axis=1)  # [B, C, D]
        weights = jnp.take_along_axis(out.weights, positions[None], axis=2)  # [E, B, C]
        weights = jnp.moveaxis(weights, 0, -1)
        size = math.gcd(count, 1 << (max(1, CHUNK_POSITIONS // len(tokens)) - 1).bit_length())

        def split(x):  # [B, C, ...] -> [C / size, B, size, ...]
            return x.reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)

        def join(x):
            return x.swapaxes(0, 1).reshape(targets.shape)

        def score(chunk):
            hidden, weights, targets = chunk
            weights = jnp.moveaxis(weights, -1, 0)
            logits = output_logits(backbone, (experts,), hidden, weights, config)
            is_target = targets >= 0
            log_probabilities = _log_probabilities(logits, targets, sampling)
            is_greedy = likeliest(logits)[..., None] == targets
            return jnp.where(is_target, log_probabilities, 0.0), is_greedy | ~is_target

        scores = jax.lax.map(score, (split(hidden), split(weights), split(targets)))
        return LogLikelihoods(*map(join, scores))

    weights = (backbone, experts)
    specs = mesh and (*specs_of(weights, mesh), BATCH, BATCH, BATCH, BATCH)
    run = placement.shard_map(local, mesh, specs, LogLikelihoods(BATCH, BATCH))  # type: ignore[arg-type]
    return run(*weights, tokens, lengths, targets, allowed)


def _log_probabilities(logits, targets, sampling: Sampling | None):
    """float32 [B, C, V], int32 [B, C, K] -> float32 [B, C, K]."""
    if sampling is None:
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0), axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, tokens = candidates(logits, sampling)
    is_candidate = tokens[..., None, :] == targets[..., None]
    return jnp.max(jnp.where(is_candidate, values[..., None, :], -jnp.inf), axis=-1)
