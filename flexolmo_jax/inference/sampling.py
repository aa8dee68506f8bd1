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
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = jnp.where(_in_nucleus(logits, sampling.top_p), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _in_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """The fewest tokens whose probabilities reach top_p: bool [B, V]. The best one is always in."""
    order = jnp.argsort(-logits, axis=-1)
    sorted_probabilities = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    before = jnp.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
    rank = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(before < top_p, rank, axis=-1)
