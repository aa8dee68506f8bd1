"""Private experts of low rank: the factors' gradient, and what comes of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax import tensors
from flexolmo_jax.data.flexmix import prepare
from flexolmo_jax.data.loader import batches
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.merge import read_expert
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.training.low_rank import LowRankLoss, expanded, initial_factors
from flexolmo_jax.training.step import ExpertAloneLoss

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def anchor(world):
    return read_anchor(world.anchor)


@pytest.fixture(scope="module")
def batch(world, anchor):
    folder = world.run("math") / "data"
    source, _ = prepare(
        str(world.texts["math"]), world.config("alone").data, anchor.tokenizer, folder
    )
    return next(batches(source, 0))


def gradients(anchor, batch, factors):
    """Of the network that the factors make, and of the factors."""
    frozen = (anchor.weights, anchor.weights.public.router)
    network = expanded(anchor.weights.public.feed_forward, factors)
    whole, few = ExpertAloneLoss(anchor.config, 1e-5), LowRankLoss(anchor.config, 1e-5)
    of_network = jax.grad(lambda trained: whole(trained, frozen, batch)[0])(network)
    of_factors = jax.grad(lambda trained: few(trained, frozen, batch)[0])(factors)
    return jax.tree.leaves(of_network), of_factors


def test_an_expert_starts_as_the_public_one_bit_for_bit(anchor):
    public = anchor.weights.public.feed_forward
    made = expanded(public, initial_factors(public, 3, jax.random.key(0)))
    for one, other in zip(*map(jax.tree.leaves, (made, public)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_the_gradient_of_the_factors_is_that_of_the_matrix_times_the_other(anchor, batch):
    factors = initial_factors(anchor.weights.public.feed_forward, 3, jax.random.key(0))
    some = jax.random.split(jax.random.key(1), len(factors))
    factors = [
        f._replace(second=0.02 * jax.random.normal(key, f.second.shape))
        for f, key in zip(factors, some, strict=True)
    ]
    of_network, of_factors = gradients(anchor, batch, factors)
    for matrix, given, found in zip(of_network, factors, of_factors, strict=True):
        first = jnp.einsum("leab,lerb->lear", matrix, given.second)
        second = jnp.einsum("lear,leab->lerb", given.first, matrix)
        for one, other in ((found.first, first), (found.second, second)):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(other).max())


def test_the_first_gradient_is_about_as_long_as_that_of_the_matrix(anchor, batch):
    """So that a clip norm means the same."""
    public = anchor.weights.public.feed_forward
    of_network, of_factors = gradients(
        anchor, batch, initial_factors(public, 16, jax.random.key(0))
    )
    whole = np.linalg.norm([np.linalg.norm(leaf) for leaf in of_network])
    few = np.linalg.norm([np.linalg.norm(one.second) for one in of_factors])
    assert 0.7 < few / whole < 1.4
    assert not any(np.any(one.first) for one in of_factors)  # as the others are 0


def test_a_private_expert_of_low_rank_is_one_like_others(world, anchor, flexolmo, tmp_path):
    words = world.expert_words(tmp_path / "out", run=tmp_path / "run")
    private = ("--dp-epsilon", 4, "--dp-windows", 2, "--dp-at-a-time", 4, "--dp-rank", 2)
    code, _, error = flexolmo(*words, *private)
    assert code == 0, error
    made = tensors.named(read_expert(tmp_path / "out", anchor).feed_forward)
    for name, start in tensors.named(anchor.weights.public.feed_forward).items():
        change = np.asarray(made[name], np.float64) - np.asarray(start, np.float64)
        values = np.linalg.svd(change, compute_uv=False)  # [L, 1, min(A, B)]
        assert (values[..., 1] > 1e-4 * values[..., 0]).all(), name
        assert (values[..., 2] < 1e-4 * values[..., 0]).all(), name
    assert read_manifest(tmp_path / "out")["privacy"]["rank"] == 2
    assert flexolmo("privacy", "verify", tmp_path / "out")[0] == 0


def test_what_cannot_be_of_low_rank_is_refused(world, refused, tmp_path):
    words = world.expert_words(tmp_path / "out", "--dp-epsilon", 4, run=tmp_path / "run")
    assert "rank must be positive, found 0" in refused(*words, "--dp-rank", 0)
    said = refused(*words, "--dp-rank", 2, "--gating", "pair")
    assert "--dp-rank with gating='pair'" in said
    assert not (tmp_path / "budget.json").exists()
