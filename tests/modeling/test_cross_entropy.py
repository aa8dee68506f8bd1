"""Chunked cross-entropy against the one written out, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.modeling.kernels.cross_entropy import cross_entropy

pytestmark = pytest.mark.usefixtures("optimized")


def plain(hidden, head, targets, weights, z_loss):
    logits = hidden @ head
    log_total = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jnp.sum(weights * (log_total - target))
    return nats + z_loss * jnp.sum(weights * log_total**2), nats


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 20),
    chunk=st.integers(1, 24),
    z_loss=st.sampled_from([0.0, 1e-2]),
)
def test_chunks_equal_the_whole(seed, length, chunk, z_loss):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((3, length, 8), np.float32)
    head = rng.standard_normal((8, 32), np.float32)
    targets = jnp.asarray(rng.integers(0, 32, (3, length)), jnp.int32)
    weights = rng.random((3, length), np.float32) * (rng.random((3, length)) < 0.8)

    def ours(hidden, head):
        return cross_entropy(hidden, head, targets, weights, z_loss=z_loss, chunk=chunk)

    def theirs(hidden, head):
        return plain(hidden, head, targets, weights, z_loss)

    np.testing.assert_allclose(ours(hidden, head), theirs(hidden, head), rtol=2e-5, atol=1e-5)
    grads = [
        jax.grad(lambda *a, f=f: f(*a)[0], argnums=(0, 1))(hidden, head) for f in (ours, theirs)
    ]
    for found, expected in zip(*grads, strict=True):
        scale = np.abs(expected).max() + 1e-3
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)
    alone = jax.grad(lambda h: 3.0 * ours(h, head)[0])(hidden)  # the head frozen; a scaled loss
    np.testing.assert_allclose(alone, 3.0 * grads[0][0], rtol=1e-5, atol=1e-6)


def test_the_logits_are_never_all_there():
    vocabulary, length = 100_352, 2048

    def loss(hidden, head):
        targets, weights = jnp.zeros((1, length), jnp.int32), jnp.ones((1, length))
        return cross_entropy(hidden, head, targets, weights, chunk=128)[0]

    shapes = (
        jax.ShapeDtypeStruct((1, length, 16), jnp.float32),
        jax.ShapeDtypeStruct((16, vocabulary), jnp.float32),
    )
    memory = jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * vocabulary * 4 / 4
