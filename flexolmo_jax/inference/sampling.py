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


def sample(logits: Float[Array, "B V"], keys: jax.Array, sampling: Sampling) -> Int[Array, " B"]:
    """Chooses the next tokens; one random key per sequence makes each independent of the others.

    Args:
      logits: of the next tokens.
      keys: random keys [B].
      sampling: its temperature and top_p may also be float32 [B, 1], of each sequence.
    """
    if isinstance(sampling.temperature, float | int) and sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    log_probabilities, tokens = candidates(logits, sampling)
    drawn = jax.vmap(jax.random.categorical)(keys, log_probabilities)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


def candidates(
    logits: Float[Array, "*T V"], sampling: Sampling
) -> tuple[Float[Array, "*T k"], Int[Array, "*T k"]]:
    """The truncated distribution of the next token, for a temperature above 0.

    Returns:
      the log-probabilities, -inf where top_p excludes a token, and their tokens. k is top_k, if
      that is below V. The likeliest token is never excluded.
    """
    logits, size = logits / sampling.temperature, logits.shape[-1]
    tokens = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), logits.shape)
    if sampling.top_p is not None or (sampling.top_k or size) < size:
        logits, tokens = jax.lax.top_k(logits, min(sampling.top_k or size, size))
    if sampling.top_p is not None:  # the smallest set of likeliest tokens that sum to top_p
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
    return jax.nn.log_softmax(logits), tokens
