"""Batched log-likelihoods against the slow obvious way: one query, all logits, nothing shared."""

import numpy as np
import pytest
from scipy.special import log_softmax

from flexolmo_jax.evaluation.likelihood import Query, likelihoods
from flexolmo_jax.inference import likelihood


def slowly(model, query, **masks):
    """One query after the other, in a row of one length."""
    limit = model.config.max_length
    ids = [*query.context, *query.continuation][-(limit + 1) :]
    padded = np.zeros((1, limit), int)  # what comes later cannot be seen
    padded[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(model.logits(padded, **masks))[0, : len(ids) - 1]
    count = len(query.continuation)
    nats = log_softmax(logits.astype(np.float64), axis=-1)[-count:]
    return (
        nats[np.arange(count), list(query.continuation)].sum(),
        logits[-count:].argmax(axis=-1).tolist() == list(query.continuation),
    )


def queries(model):
    rng = np.random.default_rng(0)
    limit, size = model.config.max_length, model.config.vocab_size

    def ids(count):
        return rng.integers(0, size, count).tolist()

    made = [Query(ids(n), ids(m)) for n, m in ((1, 1), (3, 2), (40, 9), (limit, 5), (200, 20))]
    made += [Query(ids(1), ids(limit)), Query(ids(9), ids(limit)), Query(ids(7), ids(8))]
    question = ids(11)
    made += [Query(question, [letter]) for letter in ids(5)]  # five letters, one row
    made.append(Query(question[:-2], [*question[-2:], 3]))  # the same row, a longer continuation
    best = np.asarray(model.logits(np.array([question])))[0, -1].argmax()
    return [*made, Query(question, [int(best)]), made[0]]


@pytest.mark.parametrize("masks", [{}, {"without": ["loud"]}, {"only": ["public", "math"]}])
def test_answers_are_those_of_the_slow_way(model, masks):
    asked = queries(model)
    counts = []
    found = likelihoods(model, asked, **masks, advance=counts.append)
    for query, answer in zip(asked, found, strict=True):
        nats, greedy = slowly(model, query, **masks)
        assert answer.nats == pytest.approx(nats, abs=2e-4) and answer.greedy == greedy
    assert sum(counts) == len(asked)
    assert any(answer.greedy for answer in found) or masks


def test_a_row_is_read_once_and_shapes_are_few(model, monkeypatch):
    rows, shapes = [], set()
    compute = likelihood.log_likelihoods

    def counted(backbone, experts, tokens, lengths, targets, *rest):
        rows.append(len(tokens))
        shapes.add((*tokens.shape, *targets.shape))
        return compute(backbone, experts, tokens, lengths, targets, *rest)

    monkeypatch.setattr(likelihood, "log_likelihoods", counted)
    question = list(range(2, 22))
    likelihoods(model, [Query(question, [letter]) for letter in range(300, 316)])
    assert rows == [1]
    rows.clear()
    likelihoods(model, [Query(question[: n % 19 + 1], [n + 30, 7]) for n in range(200)])
    assert sum(rows) == 256 and len(shapes) == 2  # as for 256 rows of 32 tokens


def test_an_expert_that_is_off_does_not_matter(model):
    """Bit for bit, in a batch of its own."""
    asked = queries(model)[:4]
    without = likelihoods(model, asked, without=["math", "code", "loud"])
    assert without == likelihoods(model, asked, only=["public"])
    assert without != likelihoods(model, asked)


def test_what_cannot_be_asked_is_refused(model):
    limit = model.config.max_length
    for query in (Query([], [1]), Query([1], []), Query([1], [2] * (limit + 1))):
        with pytest.raises(ValueError, match=f"query 1: expected .* 1 to {limit} tokens"):
            likelihoods(model, [Query([1], [2]), query])
    with pytest.raises(ValueError, match=r"must be in \[0, 512\), .*; found 700"):
        likelihoods(model, [Query([1], [700])])
    with pytest.raises(ValueError, match="no expert named 'nobody'"):
        likelihoods(model, [Query([1], [2])], without=["nobody"])
