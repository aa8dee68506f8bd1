"""Blocked attention against attention written out, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.modeling.kernels.flash_attention import (
    MAX_UNROLLED_LENGTH,
    MIN_BLOCK,
    self_attention,
)

pytestmark = pytest.mark.usefixtures("optimized")


def plain(q, k, v, segments):
    """Every score of every head at once."""
    repeat = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    scores = jnp.einsum("bsnh,btnh->bnst", q, k) / np.sqrt(q.shape[-1])
    index = jnp.arange(q.shape[1])
    seen = (index[:, None] >= index) & (segments[:, :, None] == segments[:, None, :])
    return jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30)), v)


def both(function, q, k, v, segments, d_out):
    """The output, and the gradients of its inner product with d_out."""
    out = function(q, k, v, segments)
    return out, *jax.grad(
        lambda *args: jnp.sum(function(*args, segments) * d_out), argnums=(0, 1, 2)
    )(q, k, v)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 5, MIN_BLOCK, MIN_BLOCK + 1, 200, MAX_UNROLLED_LENGTH + 64]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
)
def test_blocked_equals_plain(seed, batch, length, heads):
    rng = np.random.default_rng(seed)
    queries, keys = heads
    q, d_out = (rng.standard_normal((batch, length, queries, 8), np.float32) for _ in range(2))
    k, v = (rng.standard_normal((batch, length, keys, 8), np.float32) for _ in range(2))
    segments = np.cumsum(rng.random((batch, length)) < 0.1, axis=1).astype(np.int32)  # 0: padding
    args = (q, k, v, jnp.asarray(segments), d_out)
    expected = both(plain, *args)
    found = both(lambda *a: self_attention(*a, "blocked"), *args)
    for ours, theirs in zip(found, expected, strict=True):
        scale = np.abs(theirs).max() + 0.1  # some gradients are 0
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5)


def test_the_tpu_kernel_equals_plain():
    """Interpreted on CPU; two documents and grouped heads."""
    rng = np.random.default_rng(0)
    q, d_out = (rng.standard_normal((1, 128, 2, 128), np.float32) for _ in range(2))
    k, v = (rng.standard_normal((1, 128, 1, 128), np.float32) for _ in range(2))
    segments = jnp.asarray(np.arange(128)[None] // 70 + 1, jnp.int32)
    expected = both(plain, q, k, v, segments, d_out)
    found = both(lambda *a: self_attention(*a, "splash"), q, k, v, segments, d_out)
    for ours, theirs in zip(found, expected, strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5)


def test_no_scores_of_a_long_sequence_are_held():
    """The program's temporary memory grows with the length, not with its square."""

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
        loss = lambda q, s: jnp.sum(self_attention(q, q, q, s, "blocked") ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(x, segments).compile().memory_analysis()

    short, long = (temporary(n).temp_size_in_bytes for n in (4096, 8192))
    whole = 8192 * 8192 * 4
    assert long < whole / 2, (short, long)


def test_an_impossible_choice_is_refused():
    x = jnp.zeros((1, 100, 2, 64))
    with pytest.raises(ValueError, match="multiples of 128, found 100 and 64"):
        self_attention(x, x, x, jnp.ones((1, 100), jnp.int32), "splash")
