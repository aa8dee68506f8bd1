"""Choosing the next token: greedy, or from a tempered, truncated distribution."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ONE_IN_BITS = 0x3F800000  # the bits of 1.0 in float32, the largest probability


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
        return likeliest(logits)
    log_probabilities, tokens = candidates(logits, sampling, size)
    noise = jax.vmap(lambda key, row: jax.random.gumbel(key, row.shape))(keys, log_probabilities)
    drawn = likeliest(log_probabilities + noise)  # as `jax.random.categorical` draws
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


def likeliest(logits: Float[Array, "*T V"]) -> Int[Array, "*T"]:
    """The likeliest token, the first one of several.

    `jnp.argmax` in two steps: XLA for CPU computes it number by number, and each of these in
    vectors, which takes a fraction of the time.
    """
    last = logits.shape[-1] - 1
    is_best = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_best, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


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
    if sampling.top_k is not None:
        logits, tokens = jax.lax.top_k(logits, size)
        logits = jnp.where(jnp.arange(size) < sampling.top_k, logits, -jnp.inf)
    if sampling.top_p is not None:
        logits = jnp.where(_is_in_nucleus(logits, sampling.top_p), logits, -jnp.inf)
    return jax.nn.log_softmax(logits), tokens


def _is_in_nucleus(
    logits: Float[Array, "*T V"], top_p: float | Float[Array, "B 1"]
) -> Bool[Array, "*T V"]:
    """Which tokens are of the fewest likeliest that have `top_p` together (Holtzman et al. 2020).

    A token is if likelier ones have less. The smallest such probability is found by bisection,
    which is exact and does not sort: sorting a vocabulary takes longer than a small model.
    """
    probabilities = jax.nn.softmax(logits)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        is_likelier = probabilities > _float_of(middle)
        likelier = jnp.sum(jnp.where(is_likelier, probabilities, 0), axis=-1, keepdims=True)
        is_inside = likelier < top_p
        return jnp.where(is_inside, low, middle), jnp.where(is_inside, middle, high)

    # Between 0 and 1, floats are in the order of their bits as integers.
    one = jnp.full_like(probabilities[..., :1], ONE_IN_BITS, jnp.int32)
    _, high = jax.lax.fori_loop(0, ONE_IN_BITS.bit_length(), halve, (0 * one, one))
    return probabilities >= _float_of(high)


def _float_of(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
