"""Ensembles of whole models equal what their definition says, written out token by token."""

import math

import numpy as np
import pytest

from flexolmo_jax.studies.baselines import methods

MODELS, SEQUENCES, TOKENS = 4, 3, 12
PREFIX = 5


@pytest.fixture(scope="module")
def nats():
    return np.random.default_rng(0).gamma(2.0, 1.5, (MODELS, SEQUENCES, TOKENS))


def slowly(nats, active, decay=None, prefix=None):
    """Bayes' rule on probabilities, for each token of each sequence."""
    out = np.zeros(nats.shape[1:])
    for n in range(nats.shape[1]):
        for t in range(nats.shape[2]):
            posterior = []
            for model in nats[:, n]:
                seen = range(t)
                if prefix is not None:
                    seen = range(prefix) if t >= prefix else range(0)
                likelihood = 1.0
                for s in seen:
                    share = 1.0 if decay is None else decay ** (t - 1 - s)
                    likelihood *= math.exp(-model[s]) ** share
                posterior.append(likelihood)
            kept = sorted(posterior)[-active:]
            weights = [p if p >= kept[0] else 0.0 for p in posterior]
            total = sum(weights)
            probability = sum(w / total * math.exp(-nats[m, n, t]) for m, w in enumerate(weights))
            out[n, t] = -math.log(probability)
    return out


@pytest.mark.parametrize("active", [1, 2, MODELS])
def test_btm_is_bayes_rule(nats, active):
    running = methods.btm(nats, methods.running_evidence(nats), active)
    np.testing.assert_allclose(running, slowly(nats, active), rtol=1e-9)
    decayed = methods.btm(nats, methods.running_evidence(nats, 0.7), active)
    np.testing.assert_allclose(decayed, slowly(nats, active, decay=0.7), rtol=1e-9)
    prefix = methods.btm(nats, methods.prefix_evidence(nats, PREFIX), active)
    np.testing.assert_allclose(prefix, slowly(nats, active, prefix=PREFIX), rtol=1e-9)


def test_btm_does_not_underflow(nats):
    long = np.concatenate([nats] * 200, axis=-1)  # evidence of about -7000 nats
    found = methods.btm(long, methods.running_evidence(long), 1)
    best = long.sum(axis=-1).argmin(axis=0)
    last = [long[model, n, -1] for n, model in enumerate(best)]
    np.testing.assert_allclose(found[:, -1], last)


def test_a_prompt_is_answered_by_the_first_model_and_the_rest_by_the_chosen_one(nats):
    found = methods.follow(nats, np.array([2, 0, 3]), PREFIX)
    np.testing.assert_array_equal(found[:, :PREFIX], nats[0, :, :PREFIX])
    np.testing.assert_array_equal(found[0, PREFIX:], nats[2, 0, PREFIX:])
    np.testing.assert_array_equal(found[2, PREFIX:], nats[3, 2, PREFIX:])


def test_the_classifier_distinguishes_domains():
    prose = [f"the old man went down to the river on day {i} and sang" for i in range(40)]
    sums = [f"Calculate {i} + {i * 7}. Answer: {i * 8}. Solve {i}*x = 3." for i in range(40)]
    classifier = methods.domain_classifier([prose, sums])
    found = classifier.predict(["a man sang on the river", "Solve 12*x = 4. Answer"])
    assert found.tolist() == [0, 1]
