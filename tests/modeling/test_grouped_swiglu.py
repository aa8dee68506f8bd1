"""Grouped expert compute against the dense one, forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.modeling.kernels.grouped_swiglu import (
    BATCHED_MAX_ROWS,
    BLOCK_SIZES,
    grouped_swiglu,
)

pytestmark = pytest.mark.usefixtures("optimized")

WIDTH, HIDDEN = 8, 12


def dense(x, weights, gate, up, down):
    """Every expert for every token."""
    total = jnp.zeros_like(x)
    for e in range(len(gate)):
        out = (jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e]
        total += jnp.where(weights[e][:, None] > 0, weights[e][:, None] * out, 0)
    return total


@functools.partial(jax.jit, static_argnames="active")
def both(x, weights, gate, up, down, d_out, active):
    """Output and gradients, grouped and dense."""
    ways = (functools.partial(grouped_swiglu, active=active), dense)
    found = []
    for way in ways:
        out, back = jax.vjp(way, x, weights, gate, up, down)
        found.append((out, *back(d_out)))
    return found


def random(seed, experts, tokens):
    rng = np.random.default_rng(seed)
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    matrices = (
        normal((experts, WIDTH, HIDDEN)), normal((experts, WIDTH, HIDDEN)),
        normal((experts, HIDDEN, WIDTH)),
    )  # fmt: skip
    return rng, normal((tokens, WIDTH)), matrices, normal((tokens, WIDTH))


def assert_equal(x, weights, matrices, d_out, active):
    ours, theirs = both(x, jnp.asarray(weights, jnp.float32), *matrices, d_out, active=active)
    for found, expected in zip(ours, theirs, strict=True):
        scale = np.abs(expected).max() + 1e-3
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1, 5), (4, 2, 96), (7, 5, 70), (8, 4, 1), (16, 2, 300)]),
    masked=st.floats(0, 0.5),
    favour=st.sampled_from([0.0, 5.0]),
)
def test_grouped_equals_dense(seed, shape, masked, favour):
    """Random routing; some experts are masked for some tokens, some get nearly all tokens."""
    experts, active, tokens = shape
    rng, x, matrices, d_out = random(seed, experts, tokens)
    logits = rng.standard_normal((experts, tokens)) + favour * (np.arange(experts) == 0)[:, None]
    chosen = np.argsort(-logits, axis=0)[:active]
    weights = np.zeros((experts, tokens))
    np.put_along_axis(weights, chosen, rng.random((active, tokens)) + 0.1, axis=0)
    weights[rng.random((experts, tokens)) < masked] = 0
    assert_equal(x, weights, matrices, d_out, active)


@pytest.mark.parametrize(
    "tokens",
    [BLOCK_SIZES[0] - 1, BLOCK_SIZES[0], 3 * BLOCK_SIZES[0] + 9, 3 * BATCHED_MAX_ROWS + 17],
)
def test_one_expert_gets_all_and_the_others_none(tokens):
    _, x, matrices, d_out = random(0, 3, tokens)
    for favourite in range(3):
        weights = np.zeros((3, tokens))
        weights[favourite] = 0.5
        assert_equal(x, weights, matrices, d_out, active=1)


def test_all_experts_are_used_and_none_is():
    _, x, matrices, d_out = random(0, 3, 40)
    assert_equal(x, np.full((3, 40), 0.3), matrices, d_out, active=3)
    assert_equal(x, np.zeros((3, 40)), matrices, d_out, active=2)


def test_an_expert_that_nobody_uses_may_be_nan():
    _, x, matrices, d_out = random(0, 3, 40)
    for matrix in matrices:
        matrix[1] = np.nan
    weights = np.stack([np.full(40, 0.4), np.zeros(40), np.full(40, 0.6)])
    out = grouped_swiglu(x, jnp.asarray(weights, jnp.float32), *matrices, active=2)
    assert np.isfinite(out).all()
