"""What an index finds, beside brute force: longest matches, counts and places."""

import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.suffixes import (
    SEPARATOR,
    Suffixes,
    as_bytes,
    find,
    longest_matches,
    sort,
)
from flexolmo_jax.tracing.withdraw import withdraw

VOCABULARY = 12
# Few different tokens make many repeats, and documents that begin or end alike.
DOCUMENTS = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=8, unique_by=tuple
)
ASKED = st.lists(st.integers(0, 5), max_size=20)


def shard_of(documents, vocabulary=VOCABULARY):
    tokens = np.concatenate([[*document, SEPARATOR] for document in documents]).astype(np.uint32)
    counts = np.bincount(tokens[tokens != SEPARATOR], minlength=vocabulary)
    order = sort(as_bytes(tokens, counts), counts.sum())
    return Suffixes(tokens, order, np.concatenate([[0], np.cumsum(counts)]))


def places(documents, ids):
    """Everywhere that ids stand in documents."""
    return [
        (number, start)
        for number, document in enumerate(documents)
        for start in range(len(document) - len(ids) + 1)
        if document[start : start + len(ids)] == ids
    ]


def longest(documents, ids):
    lengths = [
        next(n for n in range(len(ids) - i, -1, -1) if not n or places(documents, ids[i : i + n]))
        for i in range(len(ids))
    ]
    return lengths


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS)
def test_suffixes_are_in_order(documents):
    shard = shard_of(documents)
    tokens = shard.tokens.tolist()
    own = [place for place, token in enumerate(tokens) if token != SEPARATOR]
    assert shard.order.tolist() == sorted(own, key=lambda place: tokens[place:])


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS, ASKED)
def test_the_longest_matches_are_those_of_brute_force(documents, ids):
    found = longest_matches(shard_of(documents), np.array(ids, np.uint32))
    assert found.dtype == np.int32
    assert found.tolist() == longest(documents, ids)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(DOCUMENTS, ASKED, st.integers(1, 20), st.sets(st.integers(0, 7)))
def test_an_index_of_shards_with_withdrawn_documents_equals_brute_force(
    index_numbers, documents, ids, shard_tokens, withdrawn
):
    folder = index_numbers(documents, shard_tokens=shard_tokens)
    withdrawn = {number for number in withdrawn if number < len(documents)}
    if withdrawn:
        withdraw(folder, sorted(map(str, withdrawn)))
    index = Index.open(folder)
    shutil.rmtree(folder)
    left = [[] if number in withdrawn else d for number, d in enumerate(documents)]
    assert index.num_tokens == sum(map(len, left)) == index.counts.sum()
    assert index.num_documents == len(documents) - len(withdrawn)
    assert index.counts.tolist() == [sum(d.count(t) for d in left) for t in range(VOCABULARY)]
    assert list(index.numbers()) == [n for n in range(len(documents)) if n not in withdrawn]
    for number in index.numbers():
        assert index.read(number, 0, 99).tolist() == documents[number]
        assert index.document(number).id == str(number)
        assert index.document(number).tokens == len(documents[number])
    assert index.longest_matches(np.array(ids, np.uint32)).tolist() == longest(left, ids)
    for start in range(len(ids)):
        for stop in range(start + 1, len(ids) + 1):
            count, found = index.find(np.array(ids[start:stop], np.uint32))
            assert sorted(found) == places(left, ids[start:stop])
            assert count == len(found)


def test_places_are_spread_evenly_and_the_same_each_time(open_numbers):
    index = open_numbers([[1, 2], [1, 3], [1, 4], [1, 5], [1, 6], [2, 1]], shard_tokens=9)
    count, every = index.find(np.array([1], np.uint32))
    assert count == len(every) == 6
    for most in range(8):
        count, some = index.find(np.array([1], np.uint32), most=most)
        assert count == 6 and len(some) == min(most, 6)
        assert [place for place in every if place in some] == some
        assert some == index.find(np.array([1], np.uint32), most=most)[1]
    assert index.find(np.array([1], np.uint32), most=3)[1] == [every[1], every[3], every[5]]


def test_ids_that_no_document_has_match_nothing():
    shard = shard_of([[1, 2, 3], [4]])
    for ids in ([7, 99, SEPARATOR, SEPARATOR - 1], [3, SEPARATOR], [3, SEPARATOR, 4], [99]):
        found = longest_matches(shard, np.array(ids, np.uint32)).tolist()
        assert found == [int(token in (1, 2, 3, 4)) for token in ids]
        assert find(shard, np.array(ids, np.uint32)) == (0, 0)
    assert not len(longest_matches(shard, np.array([], np.uint32)))


def test_an_empty_question_is_refused(open_numbers):
    with pytest.raises(ValueError, match="expected at least one token"):
        open_numbers([[1, 2]]).find(np.array([], np.uint32))


def test_long_repeats_are_compared_to_their_ends():
    line = np.random.default_rng(0).integers(0, 4, 700).tolist()
    documents = [[1] * 1500, [*line, 5], [*line, 7], [0, *line[:650], 9]]
    shard = shard_of(documents)
    asked = np.array([*line, 6, *[1] * 1600], np.uint32)
    found = longest_matches(shard, asked)
    assert found[:690].tolist() == list(range(700, 10, -1))
    assert found[701:].tolist() == [1500] * 101 + list(range(1499, 0, -1))
    start, stop = find(shard, asked[:700])
    assert sorted(shard.tokens[shard.order[start:stop] + 700].tolist()) == [5, 7]


@pytest.mark.parametrize("vocabulary", [300, 70_000, 1_000_000])
def test_vocabularies_of_every_width_are_sorted_by_id(vocabulary):
    random = np.random.default_rng(vocabulary)
    ids = random.permutation(vocabulary)[:70_000]
    document = random.choice(ids, 80_000).tolist() + ids.tolist()
    shard = shard_of([document, document[:100]], vocabulary)
    tokens = shard.tokens[shard.order]
    assert (np.diff(tokens.astype(np.int64)) >= 0).all()
    following = shard.tokens[shard.order + 1].astype(np.int64)
    assert (np.diff(following)[np.diff(tokens) == 0] >= 0).all()
    asked = np.array(document[20:80], np.uint32)
    assert longest_matches(shard, asked).tolist() == list(range(60, 0, -1))


@pytest.mark.parametrize("vocabulary", [1000, 200_000])
def test_sorting_needs_at_most_twenty_bytes_a_token(vocabulary):
    tokens = np.random.default_rng(0).integers(0, vocabulary, 1_000_000).astype(np.uint32)
    counts = np.bincount(tokens, minlength=vocabulary)
    tracemalloc.start()
    sort(as_bytes(tokens, counts), len(tokens))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 20 * len(tokens)


def test_a_text_is_encoded_as_text(open_numbers):
    index = open_numbers([[1, 2, 11]])
    ids, offsets = index.encode("11 2\n 3")
    assert ids.dtype == np.uint32 and ids.tolist() == [11, 2, 3]
    assert offsets == [(0, 2), (3, 4), (6, 7)]
