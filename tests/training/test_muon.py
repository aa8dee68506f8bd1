"""Muon: which leaves it trains, and that its update is what optax's Muon, and NumPy, compute."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexolmo_jax as fo
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.transformer import abstract_model, init_anchor
from flexolmo_jax.storage import tensors
from flexolmo_jax.training.muon import COEFFICIENTS, kinds, newton_schulz
from flexolmo_jax.training.optimizer import make_optimizer

MODEL = ModelConfig(
    vocab_size=40, width=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_width=24
)
MUON = fo.OptimizerConfig(
    name="muon", learning_rate=0.02, adamw_learning_rate=1e-3, weight_decay=0.1
)
SPECS = {  # written independently of the package: the axes of optax.contrib.muon
    "q": (1, (2, 3)), "k": (1, (2, 3)), "v": (1, (2, 3)), "o": ((1, 2), 3),
    "gate": (2, 3), "up": (2, 3), "down": (2, 3), "a": (2, 3), "b": (2, 3),
}  # fmt: skip


def low_rank(expert_axis=1):
    """Leaves as a low-rank head has them."""
    draw = np.random.default_rng(2).standard_normal
    return {
        "head": {
            "a": jnp.asarray(draw((1, expert_axis, 16, 6)), jnp.float32),
            "b": jnp.asarray(draw((1, expert_axis, 6, 40)), jnp.float32),
            "bias": jnp.zeros((1, expert_axis, 40)),
        }
    }


def weights():
    """An anchor, and beside it a low-rank head."""
    return init_anchor(MODEL, jax.random.key(0)), low_rank()


def some_gradients(like, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(1e-3 * random.standard_normal(x.shape), jnp.float32), like
    )


def updates_of(optimizer, like, steps=3):
    """The updates of each step by name, as the weights move."""

    def take(like, state, grads):
        updates, state = optimizer.update(grads, state, like)
        return updates, optax.apply_updates(like, updates), state

    state, found = optimizer.init(like), []
    for step in range(steps):
        updates, like, state = jax.jit(take)(like, state, some_gradients(like, step))
        found.append({k: np.asarray(v) for k, v in tensors.named(updates).items()})
    return found


def last(name):
    return name.rsplit(".", 1)[-1]


def test_every_matrix_gets_muon_and_every_other_leaf_adamw():
    """Named one by one, so that no rule that is wrong agrees with itself."""
    experts = abstract_model(MODEL.replace(num_experts=3))[1]
    found = tensors.named(kinds((*weights(), experts)))
    attention, scales = "0.backbone.layers.attention", "0.backbone.layers"
    full = {f"{attention}.{name}" for name in "qkvo"}
    full |= {f"{f}.feed_forward.{n}" for f in ("0.public", "2") for n in ("gate", "up", "down")}
    others = {"0.backbone.embed", "0.backbone.head", "1.head.bias"}
    others |= {f"{f}.router.{n}" for f in ("0.public", "2") for n in ("row", "bias")}
    others |= {name for name in found if name.endswith("norm.scale")}
    assert sum(name.startswith(scales) and name in others for name in found) >= 4  # norms of layers
    by_kind = collections.defaultdict(set)
    for name, kind in found.items():
        by_kind[kind].add(name)
    assert by_kind == {"full": full, "low_rank": {"1.head.a", "1.head.b"}, "other": others}


def test_the_state_has_one_moment_of_each_matrix_and_two_of_all_else():
    like = weights()
    state = jax.eval_shape(make_optimizer(MUON, 10).init, like)
    moments = collections.Counter(x.shape for x in jax.tree.leaves(state) if x.ndim)
    shapes = {name: x.shape for name, x in tensors.named(like).items()}
    others = [shape for name, shape in shapes.items() if last(name) not in SPECS]
    assert moments == collections.Counter([*shapes.values(), *others])


def test_a_leaf_that_is_not_known_or_has_other_axes_is_refused():
    optimizer = make_optimizer(MUON, 10)
    for tree, message in (
        ({"attention": {"qkv": jnp.zeros((2, 4, 4))}}, r"attention.qkv: .* whether it is a matrix"),
        ({"gate": jnp.zeros((4, 6))}, r"gate: .* stack of matrices with 4 axes, found \[4, 6\]"),
        ({"q": jnp.zeros((1, 2, 4, 2, 2))}, r"q: .* found \[1, 2, 4, 2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.init(tree)


def test_updates_are_those_of_optax_and_of_adamw():
    """Matrices: optax.contrib.muon, told the axes. All else: AdamW at its own rate, as ever."""
    like, ours = weights(), updates_of(make_optimizer(MUON, 10), weights())

    def axes(tree):
        def of(path, _):
            spec = SPECS.get(last(tensors.leaf_name(path)))
            return spec and optax.contrib.MuonDimensionNumbers(*spec)

        return jax.tree_util.tree_map_with_path(of, tree)

    def muon(rate):
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.contrib.muon(
                optax.warmup_cosine_decay_schedule(rate, rate, 0, 10), weight_decay=0.1,
                muon_weight_dimension_numbers=axes, consistent_rms=0.2,
            ),
        )  # fmt: skip

    adamw = make_optimizer(fo.OptimizerConfig(learning_rate=1e-3, weight_decay=0.1), 10)
    full, half, rest = (
        updates_of(optimizer, like) for optimizer in (muon(0.02), muon(0.01), adamw)
    )
    for step, found in enumerate(ours):
        for name, update in found.items():
            short = last(name)
            expected = (half if short in "ab" else full if short in SPECS else rest)[step][name]
            scale = np.abs(expected).max() + 1e-12
            np.testing.assert_allclose(update, expected, rtol=0, atol=1e-5 * scale, err_msg=name)


def slow_newton_schulz(x):
    """The iteration of Jordan et al. on one matrix, in float64."""
    a, b, c = COEFFICIENTS
    x = x.astype(np.float64) / np.linalg.norm(x)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        s = x @ x.T
        x = a * x + b * s @ x + c * s @ s @ x
    return x.T if tall else x


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20), (7, 1)])
def test_newton_schulz_is_that_of_numpy_and_nearly_orthogonal(shape):
    x = np.random.default_rng(3).standard_normal((4, *shape)).astype(np.float32)
    x[1] *= 1e-4  # the size of a gradient does not matter
    x[2] = 0
    found = np.asarray(newton_schulz(jnp.asarray(x)))
    for one, other in zip(x[[0, 1, 3]], found[[0, 1, 3]], strict=True):
        np.testing.assert_allclose(other, slow_newton_schulz(one), atol=2e-4)
        values = np.linalg.svd(other, compute_uv=False)
        assert 0.3 < values.min() and values.max() < 1.3
        u, _, v = np.linalg.svd(one, full_matrices=False)
        assert np.sum(other * (u @ v)) > 0.65 * min(shape)  # the same singular vectors
    assert not found[2].any()


@pytest.mark.parametrize("name", ["q", "o", "gate", "down"])
def test_one_update_by_hand(name):
    """Of a single matrix of a stack: no other matrix, and no other layer, is in it."""
    like = weights()[0]
    config = fo.OptimizerConfig(name="muon", learning_rate=0.02)
    (found,) = updates_of(make_optimizer(config, 10), like, steps=1)
    (full,) = (key for key in found if last(key) == name)
    gradient = np.asarray(tensors.named(some_gradients(like, 0))[full])[2]  # of the last layer
    rows = 16 if name in "qo" else gradient.shape[-2]
    matrix = gradient.reshape(rows, -1)
    expected = -0.02 * 0.2 * max(matrix.shape) ** 0.5 * slow_newton_schulz(matrix)
    np.testing.assert_allclose(found[full][2].reshape(rows, -1), expected, atol=2e-6)
    assert np.sqrt(np.mean(found[full] ** 2)) == pytest.approx(0.02 * 0.2, rel=0.3)
