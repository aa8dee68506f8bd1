"""What every way to compute experts must do: one suite, which a new way inherits by a line of WAYS.

It takes no fixture, so that it also runs on a machine with a GPU and little else:

    python -m pytest --noconftest -q tests/modeling/test_expert_compute.py
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.inference.layerwise import add_gathered
from flexolmo_jax.modeling.experts import FeedForward
from flexolmo_jax.modeling.low_rank import FeedForwardRanks, LowRankFeedForward, LowRankGroups
from flexolmo_jax.parallel import collectives
from flexolmo_jax.storage.tensors import named

TOKENS = 1 + 63 + 65 + 257
ROUTES = {  # tokens of each of four experts; those that are left use none
    "of all sizes": (1, 63, 65, 257),
    "one is empty": (65, 0, 257, 63),
    "the first and the last are empty": (0, 257, 1, 0),
    "one has all": (0, 0, TOKENS, 0),
    "none has any": (0, 0, 0, 0),
}
SIZES = {  # D and F: each is the contracted axis of one matmul, and the last axis of another
    "N of 160": (128, 160),
    "K off the tile": (100, 136),
}
BOUNDS = {"float32": 2e-5, "bfloat16": 3e-2}  # of the largest number of an output or a gradient


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to compute experts.

    Attributes:
      add: (experts, base, x [1, T, D], weights [E, 1, T], active) -> [1, T, D]. `experts` is a
        module as `make` makes it; `base` is the public network, which low-rank experts share.
      make: (E, D, F, key) -> experts, with leaves [1, E, ...].
      full: (experts, base) -> gate, up and down as full matrices, for the definition.
      platform: for which it is chosen; None: the one that it runs on.
      trains: whether it has a gradient.
    """

    add: Callable
    make: Callable
    full: Callable
    platform: str | None = None
    trains: bool = True


def full_experts(num_experts, width, hidden, key):
    return FeedForward(1, num_experts, width, hidden, key)


def own_matrices(experts, base):
    del base
    return tuple(getattr(experts, name)[...] for name in ("gate", "up", "down"))


def low_rank_experts(num_experts, width, hidden, key):
    return LowRankFeedForward(1, num_experts, width, hidden, FeedForwardRanks(3, 5, 2), key)


def sums_with_base(experts, base):
    deltas = ((x.a[...], x.b[...]) for x in (experts.gate, experts.up, experts.down))
    public = own_matrices(base, None)
    return tuple(
        own + jnp.einsum("eir,ero->eio", *delta) for own, delta in zip(public, deltas, strict=True)
    )


def dense(experts, base, x, weights, active):
    del base, active
    return experts.add_dense(None, x, weights)


def gathered(experts, base, x, weights, active):
    del base, active
    out = jnp.zeros_like(x[0])
    for number in range(len(weights)):
        own = slice(number, number + 1)
        expert = jax.tree.map(lambda leaf, own=own: leaf[own], experts)
        tokens = jnp.argsort(weights[number].reshape(-1) <= 0)
        out = add_gathered(expert, out, x[0], weights[own, 0], tokens)
    return out[None]


def grouped(experts, base, x, weights, active):
    del base
    return experts.add_grouped(None, x, weights, active)


def low_rank(experts, base, x, weights, active):
    del active
    return LowRankGroups([experts], base).add_dense(None, x, weights)


FULL, LOW_RANK = (full_experts, own_matrices), (low_rank_experts, sums_with_base)
WAYS = {
    "dense": Way(dense, *FULL),
    "dense, gathered": Way(gathered, *FULL, trains=False),
    "grouped": Way(grouped, *FULL),
    "grouped, ragged_dot": Way(grouped, *FULL, platform="gpu"),  # the path of GPU and TPU
    "low-rank": Way(low_rank, *LOW_RANK),
}


def definition(full, experts, base, x, weights):
    """Expert by expert; the sum of weights[e] * down(silu(gate(x)) * up(x))."""
    gate, up, down = full(experts, base)
    total = jnp.zeros_like(x)
    for e, weight in enumerate(weights):
        out = (jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e]
        total += jnp.where(weight[..., None] > 0, weight[..., None] * out, 0)
    return total


def routed(sizes, rng, active):
    """Weights [E, 1, T] with that many tokens of each expert, in a random order."""
    weights = np.zeros((len(sizes), 1, TOKENS), np.float32)
    if active == 1:
        owners = np.repeat(np.arange(len(sizes)), sizes)
        tokens = rng.permutation(TOKENS)[: len(owners)]
        weights[owners, 0, tokens] = rng.uniform(0.1, 1, len(owners))
    else:  # each expert draws its tokens: a token has up to all of them
        for e, size in enumerate(sizes):
            weights[e, 0, rng.permutation(TOKENS)[:size]] = rng.uniform(0.1, 1, size)
    return weights


def drawn(tree, rng):
    """A layer's module, whose products are about as large as what they are made of."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape[1:]) * leaf.shape[-2] ** -0.5),
        tree,
    )


def with_gradients(add, trains=True):
    """(experts, base, x, weights, d_out) -> the output and the gradients, by name."""

    def run(experts, base, x, weights, d_out):
        def out(experts, x, weights):
            return add(experts, base, x, weights)

        if not trains:
            return {"out": out(experts, x, weights)}
        found, back = jax.vjp(out, experts, x, weights)
        gradients = dict(zip(("experts", "x", "weights"), back(d_out), strict=True))
        return {"out": found, **gradients}

    return jax.jit(run)


@functools.cache
def program(way: Way, active: int) -> Callable:
    return with_gradients(functools.partial(way.add, active=active), way.trains)


@functools.cache
def defined_by(full: Callable) -> Callable:
    return with_gradients(functools.partial(definition, full))


def results(name, sizes, shape, dtype, active, monkeypatch):
    """What a way gives, and what its definition gives in float64, by name; and the weights."""
    way, rng = WAYS[name], np.random.default_rng(0)
    with jax.enable_x64():  # numbers are drawn and compared in float64
        key = jax.random.key(0)
        experts = drawn(jax.eval_shape(lambda: way.make(len(sizes), *shape, key)), rng)
        base = drawn(jax.eval_shape(lambda: full_experts(1, *shape, key)), rng)
        x, d_out = (jnp.asarray(rng.standard_normal((1, TOKENS, shape[0]))) for _ in range(2))
        arguments = experts, base, x, jnp.asarray(routed(sizes, rng, active)), d_out
        # The definition gets the numbers that the way gets.
        rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), arguments)
        exact = jax.tree.map(lambda leaf: leaf.astype("float64"), rounded)
        expected = named(defined_by(way.full)(*exact))
    with monkeypatch.context() as patch, jax.default_matmul_precision("highest"):
        if way.platform is not None:
            patch.setattr(collectives, "platform", lambda: way.platform)
        found = named(program(way, active)(*rounded))
    return found, expected, arguments[3]


def assert_conforms(found, expected, weights, dtype):
    """Finite, near to the definition, and exactly 0 where an expert has no token."""
    unused = ~np.asarray(weights > 0).any(axis=(1, 2))
    for part, values in found.items():
        values, wanted = np.asarray(values, np.float64), np.asarray(expected[part])
        assert np.isfinite(values).all(), part
        np.testing.assert_allclose(
            values, wanted, rtol=0, atol=BOUNDS[dtype] * np.abs(wanted).max(), err_msg=part
        )
        if part.startswith("experts"):
            assert not values[unused].any(), part
            assert all(values[e].any() for e in np.flatnonzero(~unused)), part
    nowhere = ~np.asarray(weights > 0).any(axis=(0, 1))
    assert not np.asarray(found["out"], np.float64)[0, nowhere].any()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("shape", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("sizes", ROUTES.values(), ids=list(ROUTES))
def test_groups_of_every_size(name, sizes, shape, monkeypatch):
    found, expected, weights = results(name, sizes, shape, "float32", 1, monkeypatch)
    assert_conforms(found, expected, weights, "float32")


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("sizes", ["of all sizes", "one is empty"])
def test_in_bfloat16(name, sizes, monkeypatch):
    found, expected, weights = results(
        name, ROUTES[sizes], SIZES["N of 160"], "bfloat16", 1, monkeypatch
    )
    assert_conforms(found, expected, weights, "bfloat16")


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("size", [1, 257])
def test_one_group(name, size, monkeypatch):
    found, expected, weights = results(name, (size,), SIZES["N of 160"], "float32", 1, monkeypatch)
    assert_conforms(found, expected, weights, "float32")


@pytest.mark.parametrize("name", WAYS)
def test_several_experts_a_token(name, monkeypatch):
    found, expected, weights = results(
        name, ROUTES["one is empty"], SIZES["N of 160"], "float32", 4, monkeypatch
    )
    assert_conforms(found, expected, weights, "float32")


@pytest.mark.parametrize("name", WAYS)
def test_an_expert_without_tokens_may_be_nan(name, monkeypatch):
    way, rng = WAYS[name], np.random.default_rng(0)
    key, shape = jax.random.key(0), SIZES["N of 160"]
    experts = drawn(jax.eval_shape(lambda: way.make(4, *shape, key)), rng)
    base = drawn(jax.eval_shape(lambda: full_experts(1, *shape, key)), rng)
    x = jnp.asarray(rng.standard_normal((1, TOKENS, shape[0])), jnp.float32)
    weights = jnp.asarray(routed(ROUTES["one is empty"], rng, 1))
    if way.platform is not None:
        monkeypatch.setattr(collectives, "platform", lambda: way.platform)
    add = jax.jit(functools.partial(way.add, active=1))
    poisoned: Any = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), experts)
    np.testing.assert_array_equal(add(poisoned, base, x, weights), add(experts, base, x, weights))
