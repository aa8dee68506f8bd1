"""Choosing the next token: greedy, or from a tempered, truncated distribution."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How to choose. Temperature 0 is greedy; top_k and top_p cut the tail, in that order."""

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


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Next tokens.

    Args:
      logits: float32 [B, V].
      keys: one random key per sequence, so that a sequence does not depend on its neighbours.
      sampling: how.

    Returns:
      int32 [B].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept, tokens = candidates(logits, sampling)
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


def candidates(logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """The tokens that can come next, with a temperature above 0.

    Args:
      logits: float32 [..., V].
      sampling: how.

    Returns:
      log-probabilities, float32 [..., K], -inf for what top_p cut off; and the tokens that they
      are of, int32 [..., K]. K is top_k, if that is below V. The likeliest one always stays.
    """
    logits, size = logits / sampling.temperature, logits.shape[-1]
    tokens = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), logits.shape)
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    if top_p < 1 or (sampling.top_k or size) < size:
        logits, tokens = jax.lax.top_k(logits, min(sampling.top_k or size, size))
    if top_p < 1:  # the fewest tokens, of the top k, whose probabilities reach top_p
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < top_p, logits, -jnp.inf)
    return jax.nn.log_softmax(logits), tokens
