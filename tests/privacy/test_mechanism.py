"""The mechanism itself: no unit adds more than it may, and the noise is what it should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.batches import Batch
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.privacy.accounting import Mechanism
from flexolmo_jax.privacy.mechanism import (
    Clipping,
    Secret,
    batches,
    clipped_gradients,
    clipped_sum,
    with_noise,
)
from flexolmo_jax.storage import tensors
from flexolmo_jax.training.objectives import ExpertAloneLoss, OwnParts
from flexolmo_jax.training.private.steps import private_step

U, W, S = 6, 2, 16  # units, windows of each, tokens of a window


def length(tree) -> float:
    return float(optax.tree.norm(tree))


# Units whose gradient is what we say: the loss is linear.

VECTORS = st.lists(
    st.lists(
        st.floats(width=32) | st.sampled_from([0.0, 1e-38, 3e38, -3e38]), min_size=5, max_size=5
    ),
    min_size=4,
    max_size=4,
)


@functools.partial(jax.jit, static_argnames="norm")
def sum_of(vectors, norm=2.0):
    def loss(weights, _, unit):
        return jnp.vdot(weights["a"], unit[:2]) + jnp.vdot(weights["b"], unit[2:]), {}

    weights = {"a": jnp.ones(2), "b": jnp.ones(3)}
    is_empty = jnp.zeros(len(vectors), bool)
    return clipped_gradients(loss, Clipping(norm, 2), weights, None, vectors, is_empty)[0]


@settings(max_examples=200, deadline=None)
@given(VECTORS)
def test_no_unit_adds_more_than_one_whatever_it_is(vectors):
    """Also where it is NaN, infinite, or so large that its square is."""
    vectors = np.asarray(vectors, np.float32)
    for number in range(len(vectors)):
        alone = np.zeros_like(vectors)
        alone[number] = vectors[number]
        assert length(sum_of(alone)) <= 1 + 1e-5
    total = sum_of(vectors)
    assert np.isfinite(length(total)) and length(total) <= len(vectors) + 1e-4


@settings(max_examples=200, deadline=None)
@given(VECTORS, st.integers(0, 3))
def test_the_sum_changes_by_one_at_most_between_neighbours(vectors, gone):
    one = np.asarray(vectors, np.float32)
    other = one.copy()
    other[gone] = 0
    assert length(jax.tree.map(jnp.subtract, sum_of(one), sum_of(other))) <= 1 + 1e-5


def test_short_gradients_keep_their_direction_and_are_scaled_by_the_clip_norm():
    vectors = np.array([[0.5, 0, 0, 0, 0], [0, 0, 0, 0, 40], [np.nan] * 5, [0] * 5], np.float32)
    total = sum_of(vectors, norm=2.0)
    np.testing.assert_allclose(total["a"], [0.25, 0])  # 0.5 / C
    np.testing.assert_allclose(total["b"], [0, 0, 1], atol=1e-6)


# The model's own loss.


@pytest.fixture(scope="module")
def model(world):
    anchor = read_anchor(world.anchor)
    frozen = (anchor.weights, anchor.weights.public.router)
    return ExpertAloneLoss(anchor.config, 1e-5), OwnParts.of(anchor.weights.public), frozen


def units(seed=0, count=U) -> Batch:
    """Random tokens; rows from `count` on are padding, and the second unit has one window."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 512, (U, W, S + 1)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[count:] = 0
    segments[1, 1:] = 0
    batch = Batch.of(tokens, segments)
    return batch._replace(weights=batch.weights / (W * S))


@functools.partial(jax.jit, static_argnames=("loss", "clip"))
def clipped(loss, clip, trainable, frozen, batch):
    is_empty = ~jnp.any(batch.weights > 0, axis=(1, 2))
    return clipped_gradients(loss, clip, trainable, frozen, batch, is_empty)


def by_hand(loss, norm, trainable, frozen, batch):
    """The slow and obvious way: one unit after the other."""
    total = jax.tree.map(jnp.zeros_like, trainable)
    for number in range(U):
        unit = jax.tree.map(lambda x, number=number: x[number], batch)
        grads = jax.grad(lambda t, unit=unit: loss(t, frozen, unit)[0])(trainable)
        scale = min(1.0, norm / max(length(grads), 1e-30)) / norm
        total = jax.tree.map(lambda a, b, scale=scale: a + scale * b, total, grads)
    return total


@pytest.mark.parametrize(("norm", "microbatch_size"), [(0.05, None), (10.0, 1), (0.05, 2)])
def test_the_clipped_sum_is_that_of_one_unit_after_the_other(model, norm, microbatch_size):
    loss, trainable, frozen = model
    batch = units(count=5)
    found, about, norms = clipped(loss, Clipping(norm, microbatch_size), trainable, frozen, batch)
    expected = tensors.named(by_hand(loss, norm, trainable, frozen, batch))
    assert (norms > norm).sum() == (5 if norm < 1 else 0)  # the test is of both kinds
    for name, value in tensors.named(found).items():
        assert value.dtype == jnp.float32
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], atol=1e-5 * scale, err_msg=name)
    assert float(about["loss"].sum()) > 0


ADVERSARIES = {
    "one token again and again": lambda batch: batch._replace(tokens=batch.tokens * 0 + 7),
    "weights that are NaN": lambda batch: batch._replace(weights=batch.weights * jnp.nan),
    "weights that are huge": lambda batch: batch._replace(weights=batch.weights * 1e38),
    "tokens that are none": lambda batch: batch._replace(targets=batch.targets + 10**6),
    "nothing": lambda batch: batch._replace(weights=batch.weights * 0),
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_an_adversarial_document_moves_the_sum_by_one_at_most(model, name):
    """It takes the place of nothing, in the midst of others."""
    loss, trainable, frozen = model
    evil = ADVERSARIES[name](units(seed=3))
    others, clip = units(count=5), Clipping(0.05, 2)  # row 5 is padding
    with_it = jax.tree.map(lambda a, b: a.at[5].set(b[0]), others, evil)
    run = functools.partial(clipped, loss, clip, trainable, frozen)
    found, expected = run(with_it)[0], run(others)[0]
    assert length(jax.tree.map(jnp.subtract, found, expected)) <= 1 + 1e-5
    assert np.isfinite(length(found))


def test_clipped_sums_of_statistics_keep_their_sensitivity_too():
    def statistic(unit, scale):
        return jnp.outer(unit, scale)

    values = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    values[2] = np.inf
    is_empty = jnp.arange(8) == 7
    total = clipped_sum(statistic, Clipping(0.5, 4), values, is_empty, jnp.ones(2))
    for gone in range(8):
        other = clipped_sum(
            statistic, Clipping(0.5, 4), np.where(np.arange(8)[:, None] == gone, 0, values),
            is_empty, jnp.ones(2),
        )  # fmt: skip
        change = length(total - other)
        assert change <= 1 + 1e-5
        assert change == pytest.approx(0 if gone in (2, 7) else 1, abs=1e-5)


# The noise.

LEAVES = {"a": jnp.zeros((400, 250)), "b": {"c": jnp.ones((100_000,))}}


def test_noise_has_its_standard_deviation_on_every_coordinate():
    noised = with_noise(LEAVES, 3.0, jax.random.key(0))  # a fixed key: for this test only
    for found, base in zip(jax.tree.leaves(noised), jax.tree.leaves(LEAVES), strict=True):
        z = np.asarray((found - base) / 3.0, np.float64).reshape(-1)
        assert found.dtype == jnp.float32
        # 100,000 draws: five standard errors of mean, variance, third and fourth moment.
        assert abs(z.mean()) < 5 / np.sqrt(z.size)
        assert abs(z.var() - 1) < 5 * np.sqrt(2 / z.size)
        assert abs((z**3).mean()) < 5 * np.sqrt(15 / z.size)
        assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / z.size)
        rows = z.reshape(400, 250).std(axis=0)  # no coordinate without it
        assert rows.min() > 0.8 and rows.max() < 1.2
    one, two = (np.asarray(x).reshape(-1) for x in jax.tree.leaves(noised))
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(len(one))


def test_noise_comes_from_the_operating_system_and_never_twice():
    np.random.seed(0)
    one = Secret()
    np.random.seed(0)
    other = Secret()
    keys = [jax.random.key_data(s.noise_key(n)) for s in (one, other) for n in range(50)]
    assert len({tuple(np.asarray(key).tolist()) for key in keys}) == 100
    draws = {s.generator(p).integers(2**63) for s in (one, other) for p in ("training", "rows")}
    assert len(draws) == 4
    assert repr(one) == "Secret()"


def test_batches_are_poisson_samples():
    run = Mechanism(units=200, mean_batch=20, largest_batch=40, steps=2000, noise_multiplier=1.0)
    drawn = list(batches(run, run.steps, np.random.default_rng(0)))
    sizes = np.array([len(one) for one in drawn])
    assert all(len(set(one.tolist())) == len(one) for one in drawn) and sizes.max() <= 40
    assert sizes.mean() == pytest.approx(20, abs=5 * np.sqrt(18 / 2000))
    assert sizes.var() == pytest.approx(18, rel=0.2)  # N q (1 - q): not of one size
    often = np.bincount(np.concatenate(drawn), minlength=200) / 2000
    assert abs(often - 0.1).max() < 5 * np.sqrt(0.09 / 2000)


# One step.


def steps(model, optimizer, run, sizes, key=0):
    loss, trainable, frozen = model
    trainable = jax.tree.map(jnp.copy, trainable)
    state = jax.jit(optimizer.init)(trainable)
    for number, size in enumerate(sizes):
        trainable, state, metrics = private_step(
            loss, optimizer, Clipping(0.5, 2), run, trainable, state, frozen,
            units(number, size), jax.random.key(key + number),
        )  # fmt: skip
    return trainable, metrics


def test_a_step_is_the_clipped_sum_and_the_noise_over_the_mean_batch(model):
    run = Mechanism(100, 4, U, 10, noise_multiplier=2.0)
    loss, before, frozen = model
    after, metrics = steps(model, optax.sgd(1.0), run, [5])
    total = clipped(loss, Clipping(0.5, 2), before, frozen, units(0, 5))[0]
    expected = with_noise(total, 2.0, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: b - a, after, before)
    for found, value in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, value / 4, atol=1e-5)
    values = np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(moved)])
    assert values.std() == pytest.approx(2.0 / 4, rel=0.02)  # and the noise is nearly all of it
    assert 0 < float(metrics["loss"]) < 10 and 0 <= float(metrics["clipped"]) <= 1


def test_frozen_leaves_keep_every_bit_and_all_batches_run_one_program(model):
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model[2])]
    run, adamw, traced = Mechanism(100, 4, U, 10, noise_multiplier=1.0), optax.adamw(1e-3), []

    def loss(*arguments):
        traced.append(True)
        return model[0](*arguments)

    steps((loss, *model[1:]), adamw, run, [2])
    once = len(traced)
    trained, _ = steps((loss, *model[1:]), adamw, run, [0, 1, 4, U])  # one batch is empty
    assert len(traced) == once > 0
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model[2])] == before
    for old, new in zip(jax.tree.leaves(model[1]), jax.tree.leaves(trained), strict=True):
        assert not np.any(np.asarray(old) == np.asarray(new))  # noise is on every coordinate


def test_an_empty_batch_is_noise_alone(model):
    run = Mechanism(100, 4, U, 10, noise_multiplier=1.0)
    after, metrics = steps(model, optax.sgd(1.0), run, [0])
    noise = with_noise(jax.tree.map(jnp.zeros_like, model[1]), 1.0, jax.random.key(0))
    for old, new, one in zip(*map(jax.tree.leaves, (model[1], after, noise)), strict=True):
        np.testing.assert_allclose(old - new, one / 4, atol=1e-6)
    assert float(metrics["loss"]) == 0
