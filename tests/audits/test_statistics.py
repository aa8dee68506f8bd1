"""Rates, areas and lower bounds: against published figures, libraries, and known truths."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from flexolmo_jax.audits.membership import epsilon_at_least, membership, verdict
from flexolmo_jax.audits.statistics import Area, Rate

# Count, of how many, and the exact interval in percent (published with the paper's 0.7%).
PUBLISHED = ((0, 100, 0.0, 3.6), (7, 1000, 0.28, 1.44), (70, 10000, 0.55, 0.88))


@pytest.mark.parametrize(("count", "of", "low", "high"), PUBLISHED)
def test_intervals_of_rates_are_those_that_are_published(count, of, low, high):
    found = Rate.of_counts(count, of)
    assert found.rate == count / of
    assert 100 * found.low == pytest.approx(low, abs=0.006)
    assert 100 * found.high == pytest.approx(high, abs=0.03)


def test_the_area_is_scikit_learns():
    generator = np.random.default_rng(0)
    for digits in (6, 0):  # with few ties, and with many
        members = np.round(generator.normal(1, 1, 50), digits)
        others = np.round(generator.normal(0, 1, 70), digits)
        found = Area.of_scores(members, others)
        labels, scores = [1] * 50 + [0] * 70, np.concatenate([members, others])
        assert found.area == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert found.low < found.area < found.high


def test_intervals_of_areas_hold_the_truth():
    """The area of two normals that are 1 apart is 0.760."""
    truth = 0.5 * (1 + math.erf(0.5))
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        found = Area.of_scores(generator.normal(1, 1, 60), generator.normal(0, 1, 60))
        held += found.low <= truth <= found.high
    assert held >= 34  # 38 are expected


def scores(generator, epsilon, count=300):
    """Of randomised response: a coin's bit is told truly with probability e^eps / (1 + e^eps)."""
    truly = generator.random(2 * count) < 1 / (1 + math.exp(-epsilon))
    coins = generator.random(2 * count) < 0.5
    told = np.where(truly, coins, ~coins) + 1e-3 * generator.random(2 * count)
    return told[coins], told[~coins]


@pytest.mark.parametrize("truth", [0.0, 1.0, 3.0])
def test_the_lower_bound_of_epsilon_is_one(truth):
    """For a mechanism whose epsilon is known: above the truth in 5% of runs at most."""
    generator = np.random.default_rng(2)
    found = np.array([epsilon_at_least(*scores(generator, truth), 1e-5) for _ in range(60)])
    assert (found > truth).sum() <= 7  # 3 are expected at most
    assert truth == 0 or np.median(found) > 0.4 * truth  # and it is not an empty one


def test_a_perfect_attack_shows_more_with_more_canaries():
    best = [epsilon_at_least(np.ones(n), np.zeros(n), 1e-5) for n in (20, 100, 500)]
    assert best == sorted(best) and 1 < best[0] < 2.5 and 4 < best[2] < 5.5


def of(members, controls):
    return membership(np.asarray(members, float), np.asarray(controls, float), 1e-5)


def test_members_are_counted_at_a_rate_of_false_alarms():
    found = of(np.arange(50, 250), np.arange(200))
    one, tenth = found.caught
    assert (one.false_alarms.hits, one.members.hits) == (2, 52)  # above 197
    assert (tenth.false_alarms.hits, tenth.members.hits) == (0, 50)  # above 199
    assert one.members.of == one.false_alarms.of == 200
    assert found.area.area == pytest.approx(1 - 0.5 * (150 / 200) ** 2, abs=0.003)


def certificate(epsilon):
    return {"epsilon": epsilon, "delta": 1e-5}


VERDICTS = {
    "too few": (of(np.ones(99), np.zeros(99)), certificate(0.1), "no headline"),
    "a false certificate": (of(np.ones(100), np.zeros(100)), certificate(1.0), "refuted"),
    "a true one": (of(np.ones(100), np.zeros(100)), certificate(8.0), "not refuted"),
    "a leak": (of(np.ones(100), np.zeros(100)), None, "members are distinguished"),
    "no leak to be seen": (of(np.ones(100), np.ones(100)), None, "too weak"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name):
    found, statement, word = VERDICTS[name]
    assert verdict({"the expert alone": found}, statement)["verdict"] == word


def test_what_cannot_be_compared_is_refused():
    for members, controls, message in (
        ([], [1.0], "0 canaries are included and 1 held out"),
        ([1.0], [], "1 canaries are included and 0 held out"),
        ([math.nan], [1.0], "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            of(members, controls)
