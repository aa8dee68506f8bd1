"""Low-rank experts against the full experts that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.modeling.experts import Experts, join, select, with_base, with_full_feed_forward
from flexolmo_jax.modeling.low_rank import FeedForwardRanks, truncated_svd
from flexolmo_jax.modeling.transformer import Anchor, abstract_model, forward, output_logits
from flexolmo_jax.storage.tensors import named
from flexolmo_jax.training.objectives import ExpertAloneLoss, ExpertPairLoss, OwnParts

CONFIG = ModelConfig(
    vocab_size=50, width=16, num_layers=2, num_heads=4, ffn_width=24, num_experts=4, loss_chunk=4
)
RANKS = FeedForwardRanks(gate=3, up=5, down=2)
TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 11)).astype(np.int32)


def random(tree, seed):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        drawn = 0.3 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(1 + drawn if "norm" in jax.tree_util.keystr(path) else drawn)

    return jax.tree_util.tree_map_with_path(draw, tree)


def low_rank(num_experts, seed, ranks=RANKS):
    def init(key):
        return Experts(CONFIG, num_experts, key, deltas=ranks)

    return random(jax.eval_shape(init, jax.random.key(0)), seed)


@pytest.fixture(scope="module")
def model():
    """A backbone, the public expert, and three low-rank ones in a stack."""
    backbone, public = random(abstract_model(CONFIG.replace(num_experts=1)), 0)
    return backbone, public, low_rank(3, 1)


@functools.partial(jax.jit, static_argnames="config")
def run(backbone, stacks, config, allowed=None):
    out = forward(backbone, stacks, TOKENS, config, allowed=allowed)
    return output_logits(backbone, stacks, out.hidden, out.weights, config)


@pytest.mark.parametrize("compute", ["dense", "grouped"])
@pytest.mark.parametrize("active", [None, 2])
def test_the_shared_products_equal_full_experts_forward_and_backward(model, active, compute):
    backbone, public, own = model
    config = CONFIG.replace(active_experts=active, expert_compute=compute)
    target = random(jnp.zeros((*TOKENS.shape, CONFIG.vocab_size)), 2)

    def fast(own):
        return run(backbone, (public, with_base(own, public)), config)

    def obvious(own):
        full = [with_full_feed_forward(select(own, [e]), public) for e in range(3)]
        return run(backbone, (join(public, *full),), config)

    np.testing.assert_allclose(fast(own), obvious(own), atol=2e-5)
    found, expected = (
        named(jax.grad(lambda own, f=f: jnp.sum(f(own) * target))(own)) for f in (fast, obvious)
    )
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0, name
        atol = 1e-4 * float(np.abs(gradient).max())
        np.testing.assert_allclose(found[name], gradient, atol=atol, err_msg=name)


def test_a_masked_low_rank_expert_equals_one_that_was_never_there_bit_for_bit(model):
    backbone, public, own = model
    for kept in ([0, 2], [1]):
        allowed = np.asarray([True, *(e in kept for e in range(3))])
        poisoned = jax.tree.map(lambda x: x, own)
        for name in ("gate", "up", "down"):
            matrix = getattr(poisoned.feed_forward, name)
            keep = jnp.asarray(allowed[1:])[:, None, None]
            matrix.a[...] = jnp.where(keep, matrix.a[...], jnp.nan)
        off = run(backbone, (public, with_base(poisoned, public)), CONFIG, allowed)
        smaller = CONFIG.replace(num_experts=1 + len(kept))
        never = run(backbone, (public, with_base(select(own, kept), public)), smaller)
        np.testing.assert_array_equal(off, never)


def test_experts_of_unlike_ranks_and_full_ones_join(model):
    backbone, public, own = model
    other = low_rank(1, 3, FeedForwardRanks(1, 1, 7))
    config = CONFIG.replace(num_experts=3)
    first = select(own, [0])
    found = run(backbone, (public, with_base(first, public), with_base(other, public)), config)
    np.testing.assert_allclose(
        run(backbone, (join(public, first, other),), config), found, atol=2e-5
    )


@pytest.mark.parametrize("gating", ["fixed", "softmax"])
def test_training_sees_the_expert_that_the_package_will_hold(model, gating):
    backbone, public, own = model
    own = select(own, [0])
    anchor = Anchor(backbone, public)
    batch = Batch.of(TOKENS, np.ones_like(TOKENS))
    one = CONFIG.replace(num_experts=1)

    def loss(expert):
        if gating == "fixed":
            frozen = (anchor, expert.router)
            return ExpertAloneLoss(one, 1e-5)(OwnParts.of(expert), frozen, batch)[0]
        return ExpertPairLoss(one.replace(num_experts=2), 1e-5, 0.0)(expert, anchor, batch)[0]

    value = jax.jit(loss)(own)
    np.testing.assert_allclose(value, jax.jit(loss)(with_full_feed_forward(own, public)), rtol=1e-5)
    gradient = named(jax.jit(jax.grad(loss))(own).feed_forward)
    assert set(gradient) == {f"{n}.{side}" for n in ("gate", "up", "down") for side in "ab"}
    assert all(np.abs(x).max() > 0 for x in gradient.values())


def test_the_truncated_svd_is_the_nearest_product():
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((6, 3)) @ rng.standard_normal((3, 9))  # of rank 3
    a, b, kept = truncated_svd(delta, 3, None)
    np.testing.assert_allclose(a @ b, delta, atol=1e-5)
    assert kept == pytest.approx(1)
    a, b, kept = truncated_svd(delta, 2, None)
    left = np.sum((a @ b - delta) ** 2) / np.sum(delta**2)
    assert left == pytest.approx(1 - kept) and 0 < left < 0.4
    for energy in (0.3, 0.9, 0.99, 1.0):
        a, b, share = truncated_svd(delta, None, energy)
        rank = a.shape[1]
        assert share >= energy - 1e-12 and b.shape == (rank, 9)
        assert rank == 1 or truncated_svd(delta, rank - 1, None)[2] < energy
    a, b, kept = truncated_svd(np.zeros((6, 9)), None, 0.99)
    assert a.shape == (6, 1) and not (a @ b).any() and kept == 1
