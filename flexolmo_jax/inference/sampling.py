"""Choosing the next token: greedy, or from a tempered, truncated distribution."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sampling(NamedTuple):
    """Temperature 0 is greedy; else top_k, then top_p, truncate the distribution."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Raises ValueError if a value is out of its range."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")


def num_candidates(top_k: int | None, vocabulary: int) -> int:
    """How many of the likeliest tokens are drawn from, some of them perhaps with probability 0.

    One of few sizes, so that another `top_k` seldom compiles another program.
    """
    if top_k is None:
        return vocabulary
    return min(max(64, 1 << (top_k - 1).bit_length()), vocabulary)


def sample(
    logits: Float[Array, "B V"], keys: jax.Array, sampling: Sampling, size: int | None = None
) -> Int[Array, " B"]:
    """Chooses the next tokens; one random key per sequence makes each independent of the others.

    Args:
      logits: of the next tokens.
      keys: random keys [B].
      sampling: its temperature and top_p may also be float32 [B, 1], of each sequence; and its
        top_k int32 [B, 1], if `size` is the `num_candidates` of the largest.
    """
    if isinstance(sampling.temperature, float | int) and sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    log_probabilities, tokens = candidates(logits, sampling, size)
    drawn = jax.vmap(jax.random.categorical)(keys, log_probabilities)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


def candidates(
    logits: Float[Array, "*T V"], sampling: Sampling, size: int | None = None
) -> tuple[Float[Array, "*T k"], Int[Array, "*T k"]]:
    """The truncated distribution of the next token, for a temperature above 0.

    Returns:
      the log-probabilities, -inf where top_k or top_p excludes a token, and their tokens, k of them
      (`num_candidates`). The likeliest token is never excluded.
    """
    logits, vocabulary = logits / sampling.temperature, logits.shape[-1]
    if size is None:
        size = num_candidates(sampling.top_k, vocabulary)
        if (sampling.top_k or vocabulary) >= vocabulary:  # it excludes nothing
            sampling = sampling._replace(top_k=None)
    tokens = jnp.broadcast_to(jnp.arange(vocabulary, dtype=jnp.int32), logits.shape)
    if sampling.top_p is not None or sampling.top_k is not None:
        logits, tokens = jax.lax.top_k(logits, size)
    if sampling.top_k is not None:
        logits = jnp.where(jnp.arange(size) < sampling.top_k, logits, -jnp.inf)
    if sampling.top_p is not None:  # the smallest set of likeliest tokens that sum to top_p
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
    return jax.nn.log_softmax(logits), tokens
