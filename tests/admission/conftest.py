"""Experts for the world's anchor: honest ones, made up alike, and variants of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.admission.cohort import open_cohort
from flexolmo_jax.admission.policy import Policy
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.modeling.experts import Ranks


@pytest.fixture(scope="session")
def anchor(world):
    return read_anchor(world.anchor)


@pytest.fixture(scope="session")
def honest(anchor):
    """honest(seed): the weights of an expert near the public one, with rows that take little."""

    def make(seed: int):
        random = np.random.default_rng(seed)

        def near(x):
            return x + 0.01 * random.standard_normal(x.shape, np.float32)

        return jax.tree.map(near, anchor.weights.public)

    return make


@pytest.fixture(scope="session")
def write(anchor):
    """write(path, expert, name): a package; `facts` are fields of its manifest."""

    def write(path, expert, name=None, **facts):
        write_expert(path, expert, name or path.name, anchor, {"licence": "CC0-1.0", **facts})
        return path

    return write


@pytest.fixture(scope="session")
def with_head(anchor, honest):
    """with_head(seed, {token: number}): an expert whose head adds these to the tokens' logits."""

    def make(seed: int, logits: dict[int, float]):
        expert = honest(seed)
        expert.set_heads(anchor.config, Ranks(head=2), jax.random.key(seed))
        bias = np.zeros(expert.head.bias.shape, np.float32)
        for token, number in logits.items():
            bias[..., token] = number
        expert.head.bias[...] = jnp.asarray(bias)
        return expert

    return make


@pytest.fixture(scope="session")
def admitted(honest, write, tmp_path_factory):
    """Six packages that were admitted before."""
    folder = tmp_path_factory.mktemp("admitted")
    return [write(folder / f"old{seed}", honest(seed)) for seed in range(6)]


@pytest.fixture(scope="session")
def cohort(world, admitted):
    return open_cohort(world.anchor, tuple(map(str, admitted)))


@pytest.fixture(scope="session")
def policy(world, admitted):
    """The default bounds, with that cohort, and texts of one domain."""
    return Policy(cohort=tuple(map(str, admitted)), domains={"old0": str(world.texts["code"])})
