"""Decoding from unstacked weights against decoding over the stacks; int8 weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.inference.cpu_weights import unstack
from flexolmo_jax.inference.layerwise import Network
from flexolmo_jax.inference.sequences import Tokens
from flexolmo_jax.modeling.experts import select
from flexolmo_jax.modeling.int8 import to_int8
from flexolmo_jax.modeling.kernels.quantized import Quantized, quantize, round_matrix

TOKENS = np.array([[5, 3, 8, 1], [7, 7, 2, 9]], np.int32)
MANY_TOKENS = np.random.default_rng(0).integers(0, 512, (2, 50)).astype(np.int32)


def last_logits(model, weights, tokens, allowed):
    """Over unstacked weights, after the last token."""
    network = Network(model.backbone, model.experts, weights, model.config)
    batch, length = tokens.shape
    read = Tokens(tokens, np.zeros(batch, np.int32), np.full(batch, length, np.int32), allowed)
    return network(read, network.empty(batch, length))[0]


@pytest.mark.parametrize(
    ("transposed", "int8"), [(False, False), (True, False), (False, True)], ids=str
)
@pytest.mark.parametrize("tokens", [TOKENS, MANY_TOKENS], ids=["few", "many"])
@pytest.mark.parametrize("active", [None, 1])
def test_unstacked_weights_give_the_same_logits(model, transposed, int8, tokens, active):
    if int8:
        model = in_form(model, "int8")
    model = dataclasses.replace(model, config=model.config.replace(active_experts=active))
    allowed = np.array([[True, False, True, True], [True, True, False, True]])
    expected = model.logits(tokens, allowed=allowed)[:, -1]
    weights = unstack(model.backbone, model.experts, model.config, transposed, int8)
    found = last_logits(model, weights, tokens, allowed)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


def test_unstacked_weights_are_the_memory_of_the_stacks(model):
    weights = unstack(model.backbone, model.experts, model.config, transposed=False)
    stack = model.experts.feed_forward.up[...]
    own = jax.tree.leaves(weights.layers[1].networks[2].up)[0]
    distance = own.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer()
    assert distance == (len(stack[0]) + 2) * stack[0, 0].nbytes
    np.testing.assert_array_equal(own[0], stack[1, 2])


@jax.jit  # each example is compiled: as two programs, not operation by operation
def stored_and_product(near, x):
    stored = quantize(near, int8=True)
    return stored, jax.vmap(lambda x, one: one.matmul(x))(x, stored)


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    rows=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_int8_is_off_by_half_a_step_at_most(shape, rows, scale, seed):
    rng = np.random.default_rng(seed)
    weight = (scale * rng.standard_normal(shape)).astype(np.float32)
    x = rng.standard_normal((shape[0], rows, shape[1])).astype(np.float32)
    near = np.asarray(jax.jit(round_matrix)(weight))
    step = np.abs(weight).max(axis=-2, keepdims=True) / 127
    assert (np.abs(near - weight) <= 0.5001 * step).all()
    stored, found = stored_and_product(near, x)  # rounded numbers are stored as they are
    assert stored.values.dtype == jnp.int8 and stored.shape == shape
    np.testing.assert_allclose(found, x @ near, rtol=1e-5, atol=1e-5 * scale * shape[1])


def test_a_matmul_in_8_bits_is_as_exact_as_one_of_floats_and_keeps_rows_apart():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 300)).astype(np.float32) * 10.0 ** np.arange(-3, 4)[:, None]
    x[2] = 0
    weight = quantize(jnp.asarray(rng.standard_normal((300, 50)), jnp.float32), int8=True)
    exact = x.astype(float) @ (np.asarray(weight.values, float).T * np.asarray(weight.scale, float))
    found = jax.jit(Quantized.matmul)(weight, x)
    size = np.abs(x).max(axis=-1, keepdims=True) * np.abs(exact).max() / np.abs(x).max()
    assert (np.abs(found - exact) <= 1e-6 * size).all()
    np.testing.assert_array_equal(jax.jit(Quantized.matmul)(weight, x[:4]), found[:4])
    broken = x.copy()
    broken[1, 5], broken[3, 6] = np.nan, np.inf
    found_broken = np.asarray(jax.jit(Quantized.matmul)(weight, broken))
    assert not np.isfinite(found_broken[[1, 3]]).any()
    np.testing.assert_array_equal(np.delete(found_broken, [1, 3], 0), np.delete(found, [1, 3], 0))


def rounded(model):
    """Floats that are those of the model in 8 bits."""

    def dense(own, stored):
        if not isinstance(stored, Quantized):
            return stored
        return (stored.values.mT * stored.scale[..., None, :]).reshape(own.shape)

    ints = to_int8(model.backbone, model.experts)
    backbone, experts = jax.tree.map(dense, (model.backbone, model.experts), ints)
    return dataclasses.replace(model, backbone=backbone, experts=experts)


def test_int8_keeps_what_the_model_says(model):
    """Of a rounded model, logits and generation are those of the same numbers."""
    floats, ints = rounded(model), in_form(model, "int8")
    for prompts in (["The theorem"], ["The theorem", "A river"]):
        assert ints.generate(prompts, 16) == floats.generate(prompts, 16)
    expected = floats.logits(MANY_TOKENS)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(ints.logits(MANY_TOKENS) / scale, expected / scale, atol=1e-5)


def in_form(model, form):
    """As `load(dtype=form)` returns it."""
    if form == "int8":
        backbone, experts = to_int8(model.backbone, model.experts)
        return dataclasses.replace(model, backbone=backbone, experts=experts, int8=True)
    backbone, experts = jax.tree.map(lambda x: x.astype(form), (model.backbone, model.experts))
    config = model.config.replace(dtype=form)
    return dataclasses.replace(model, backbone=backbone, experts=experts, config=config)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_skipped_expert_may_be_nan(model, form, value):
    """Also in decoding: what is switched off is not read."""
    experts = jax.tree.map(jnp.array, model.experts)
    experts.feed_forward.up[...] = experts.feed_forward.up[...].at[:, 1].set(value)
    broken = in_form(dataclasses.replace(model, experts=experts), form)
    model = in_form(model, form)
    for prompts in (["The theorem"], ["The theorem", "A river"]):
        without = [model.expert_names[1]]
        expected = model.generate(prompts, 8, without=without)
        assert broken.generate(prompts, 8, without=without) == expected


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("allowed", [[True, False, True, True], [False, True, False, False]])
def test_one_token_is_read_as_if_experts_that_are_off_were_not_there(model, form, allowed):
    """Bit for bit, though a program adds all experts that a token uses."""
    allowed = np.array(allowed)
    fewer = dataclasses.replace(
        model,
        experts=select(model.experts, np.flatnonzero(allowed).tolist()),
        config=model.config.replace(num_experts=int(allowed.sum())),
    )

    def logits(model, allowed):
        model = in_form(model, form)
        transposed = form == "bfloat16"
        weights = unstack(model.backbone, model.experts, model.config, transposed, form == "int8")
        network = Network(model.backbone, model.experts, weights, model.config)
        sequences = network.empty(1, 8)
        for position, token in enumerate(TOKENS[0]):
            start, length = np.array([position], np.int32), np.ones(1, np.int32)
            read = Tokens(np.array([[token]], np.int32), start, length, allowed[None])
            found = network(read, sequences)
            sequences = found.sequences
        return found.logits

    of_fewer = logits(fewer, np.ones(allowed.sum(), bool))
    np.testing.assert_array_equal(logits(model, allowed), of_fewer)
