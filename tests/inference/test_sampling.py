"""Choosing tokens equals the slow obvious ways: NumPy's argmax, JAX's draws, a sorted nucleus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.inference.sampling import Sampling, candidates, likeliest, sample

VOCABULARY = 1500


def some_logits(spread: float) -> np.ndarray:
    draw = np.random.default_rng(round(10 * spread)).standard_normal
    return (spread * draw((6, VOCABULARY))).astype(np.float32)


def test_the_first_of_the_likeliest_tokens():
    logits = some_logits(1)
    logits[1, [7, 900, 1499]] = 9
    logits[2] = 0
    logits[3] = -np.inf
    logits[3, 1499] = -5
    logits[4, 40:] = -np.inf
    assert (np.asarray(likeliest(logits)) == logits.argmax(-1)).all()
    assert (np.asarray(jax.jit(likeliest)(logits)) == logits.argmax(-1)).all()


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_draws_are_those_of_jax(temperature):
    logits, keys = some_logits(2), jax.random.split(jax.random.key(3), 6)
    expected = [
        jax.random.categorical(k, row / temperature) for k, row in zip(keys, logits, strict=True)
    ]
    assert sample(logits, keys, Sampling(temperature)).tolist() == [int(x) for x in expected]


def likelier(logits: np.ndarray) -> np.ndarray:
    """float64 [V]: how much probability likelier tokens have."""
    exact = np.exp(logits.astype(np.float64) - logits.max())
    exact /= exact.sum()
    order = np.argsort(-exact, kind="stable")
    before = np.empty(len(logits))
    before[order] = np.cumsum(exact[order]) - exact[order]
    return before if np.ptp(logits) else np.zeros(len(logits))


@pytest.mark.parametrize("spread", [0.0, 0.1, 1, 4, 30])  # from all alike to one token alone
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_sorted_tokens(spread, top_p):
    logits = some_logits(spread)
    own = np.full((6, 1), top_p, np.float32)
    for given in (top_p, own):  # of all sequences, or of each
        scores, tokens = candidates(jnp.asarray(logits), Sampling(1.0, None, given))
        assert (np.asarray(tokens) == np.arange(VOCABULARY)).all()
        for row, found in zip(logits, np.asarray(scores), strict=True):
            kept, before = np.isfinite(found), likelier(row)
            assert kept[before < top_p - 1e-6].all()  # the product sums in float32
            assert not kept[before > top_p + 1e-6].any()
            expected = row - row[kept].max()
            expected -= np.log(np.exp(expected[kept].astype(np.float64)).sum())
            np.testing.assert_allclose(found[kept], expected[kept], atol=2e-5)


def test_tokens_that_are_alike_are_in_the_nucleus_together():
    logits = np.full((1, VOCABULARY), -20, np.float32)
    logits[0, [3, 30, 300]] = 2
    scores, _ = candidates(jnp.asarray(logits), Sampling(1.0, None, 0.4))
    assert np.flatnonzero(np.isfinite(scores[0])).tolist() == [3, 30, 300]


def test_the_nucleus_is_of_the_tokens_that_top_k_leaves():
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    scores, tokens = candidates(jnp.asarray(logits), Sampling(1.0, 3, 0.4))
    kept = np.isfinite(np.asarray(scores))
    assert np.asarray(tokens)[kept].tolist() == [1]  # 0.4 / 0.9 is enough
    scores, tokens = candidates(jnp.asarray(logits), Sampling(1.0, None, 0.4))
    assert np.flatnonzero(np.isfinite(scores[0])).tolist() == [1]
    scores, tokens = candidates(jnp.asarray(logits), Sampling(1.0, 3, 0.5))
    assert np.asarray(tokens)[np.isfinite(np.asarray(scores))].tolist() == [1, 3]
