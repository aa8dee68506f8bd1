"""Spans: maximal, of whole words, in one sentence; and the rarest of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.tracing.bm25 import bm25, words
from flexolmo_jax.tracing.spans import (
    Asked,
    Match,
    as_asked,
    matches,
    maximal_spans,
    rarest,
    stretches,
)


def encode_words(text):
    """One token for each word with the space before it, as a byte-level tokenizer cuts them."""
    ids, offsets, start = [], [], 0
    for stop in range(1, len(text) + 1):
        ends = stop == len(text) or not (text[stop].isalnum() and text[stop - 1] not in "\n")
        if ends and text[start:stop] != " ":
            ids.append(sum(ord(c) * 31**i for i, c in enumerate(text[start:stop])) % 2**20)
            offsets.append((start, stop))
            start = stop
    return np.array(ids, np.uint32), offsets


def longest_in(ids, documents):
    """The slow and obvious longest matches."""
    longest = [0] * len(ids)
    for i in range(len(ids)):
        for document in documents:
            for j in range(len(document)):
                n = 0
                while i + n < len(ids) and j + n < len(document) and ids[i + n] == document[j + n]:
                    n += 1
                longest[i] = max(longest[i], n)
    return np.array(longest, np.int32)


def brute_force(asked, documents):
    """All spans that the rules allow, without those that lie in another one."""
    allowed = [
        (i, j)
        for i in range(len(asked.ids))
        for j in range(i + 1, int(asked.cut[i]) + 1)
        if asked.begins[i] and asked.ends[j - 1]
        and any(
            list(asked.ids[i:j]) == document[k : k + j - i]
            for document in documents
            for k in range(len(document))
        )
    ]  # fmt: skip
    return [
        (i, j)
        for i, j in allowed
        if not any(a <= i and j <= b and (a, b) != (i, j) for a, b in allowed)
    ]


@settings(deadline=None)
@given(st.data())
def test_maximal_spans_equal_brute_force(data):
    token = st.integers(0, 2)
    documents = data.draw(st.lists(st.lists(token, min_size=1, max_size=12), max_size=4))
    ids = data.draw(st.lists(token, max_size=14))
    flags = st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))
    begins, ends, last = data.draw(flags), data.draw(flags), data.draw(flags)
    count = len(ids)
    cut = [next((j + 1 for j in range(i, count) if last[j]), count) for i in range(count)]
    here = np.arange(count)
    asked = Asked(
        np.array(ids, np.uint32), here, here + 1, np.array(begins, bool), np.array(ends, bool),
        np.array(cut, np.int64),
    )  # fmt: skip
    assert maximal_spans(asked, longest_in(ids, documents)) == brute_force(asked, documents)


def spans_in(text, *documents, encode=encode_words):
    asked = as_asked(text, encode)
    all_ids = [encode(document)[0].tolist() for document in documents]
    found = matches(text, asked, [longest_in(form.ids.tolist(), all_ids) for form in asked])
    return [text[match.start : match.stop] for match in found]


@pytest.mark.parametrize(
    ("text", "document", "expected"),
    [
        ("The cat sat down", "and so The cat sat still", ["The cat sat"]),  # tokenized alone
        ("He left. The cat sat down", "The cat sat still", ["The cat sat"]),  # no space there
        ("He left.\nThe cat sat down", "Then The cat sat still", ["The cat sat"]),
        ("one two. three four", "one two. three four", ["one two.", "three four"]),
        ("one two\nthree four", "one two\nthree four", ["one two", "three four"]),
        ("pi is 3.14 and os.path", "pi is 3.14 and os.path", ["pi is 3.14 and os.path"]),
        ('He said "no way." Then', 'She said "no way." Then he', ['said "no way."', "Then"]),
        ("three two one", "so one two three", ["three", "two", "one"]),
        ("a b c d", "a b c x b c d", ["a b c", "b c d"]),
        (", ; !", ", ; !", []),  # no word in it
        ("   ", "   ", []),
    ],
)
def test_spans_of_words_within_sentences(text, document, expected):
    assert spans_in(text, document) == expected


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the cat sat on the mat and the dog sat on the log " * 3]
    return Tokenizer.train(texts, 290)


def test_a_span_never_holds_a_part_of_a_word_or_of_a_character(tokenizer):
    import tokenizers

    library = tokenizers.Tokenizer.from_str(tokenizer.json)

    def encode(text):
        encoded = library.encode(text, add_special_tokens=False)
        return np.array(encoded.ids, np.uint32), encoded.offsets

    def found(text, document):
        return spans_in(text, document, encode=encode)

    assert found("the cats sat", "the catalog sat") == ["the", "sat"]
    assert found("doesn't the cat", "don't the cat") == ["the cat"]
    assert found("the 😀 cat", "the 😃 cat") == ["the", "cat"]
    assert found("naïve cat", "naïf cat") == ["cat"]
    assert found("मैं हिन्दी में", "में हिन्दी मैं") == ["मैं", "हिन्दी", "में"]
    assert found("我喜欢猫。", "他喜欢猫。") == ["喜欢猫。"]  # no spaces between words


def test_the_rarest_spans_are_kept_in_the_order_of_the_text():
    counts = np.array([100, 1, 50, 2])
    found = [Match(10 * i, 10 * i + 5, (np.array([i]),)) for i in range(4)]
    assert [match.start for match in rarest(found, counts, 40)] == [10, 30]
    assert [match.start for match in rarest(found, counts, 1)] == [10]
    assert len(rarest(found, counts, 61)) == math.ceil(0.05 * 61) == 4
    again = [*found, Match(50, 55, (np.array([1]),))]  # all places of one count as one
    assert [match.start for match in rarest(again, counts, 40)] == [10, 30, 50]


def test_overlapping_spans_are_one_stretch():
    assert stretches([(5, 9), (0, 4), (3, 6), (9, 12)]) == [[1, 2, 0], [3]]
    assert stretches([]) == []


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.text("ab c,", max_size=12), min_size=1, max_size=5).filter(
        lambda texts: any(map(words, texts))
    ),
    st.text("ab cd", min_size=1, max_size=8).filter(lambda text: bool(words(text))),
)
def test_bm25_equals_the_library(texts, query):
    import bm25s

    library = bm25s.BM25(method="lucene")
    library.index([words(text) for text in texts], show_progress=False)
    known = [word for word in words(query) if word in library.vocab_dict]
    expected = library.get_scores(known) if known else np.zeros(len(texts))
    np.testing.assert_allclose(bm25(query, texts), expected, rtol=1e-5, atol=1e-6)
