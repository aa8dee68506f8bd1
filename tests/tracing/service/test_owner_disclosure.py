"""What is said, against the slow and obvious rule; and what the membership attack computes."""

import json
import time

import numpy as np
import pytest

from flexolmo_jax.studies import trace_membership
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.service.disclosure import TooSlow, disclose, shared_lengths
from flexolmo_jax.tracing.service.policy import Policy
from flexolmo_jax.tracing.spans import as_asked
from flexolmo_jax.tracing.trace import trace

LATER = time.monotonic() + 10_000


def holds(document: list[int], ids: list[int]) -> bool:
    return any(document[i : i + len(ids)] == ids for i in range(len(document)))


@pytest.fixture(scope="module")
def pets(indexed):
    """An index of random texts of four words, with groups; and their tokens by group."""
    draw = np.random.default_rng(0)
    names = ["cat", "dog", "cow", "the"]
    texts = [" ".join(draw.choice(names, draw.integers(3, 20))) for _ in range(25)]
    folder = indexed([f"{text} {i}" for i, text in enumerate(texts)])
    rows = folder.with_name("source.jsonl")
    for number, line in enumerate(lines := rows.read_text().splitlines()):
        lines[number] = json.dumps({**json.loads(line), "group": f"g{number % 9}"})
    rows.write_text("\n".join(lines))
    index = Index.open(_build(rows, folder))
    ids = {n: index.read(n, 0, 1000).tolist() for n in range(index.num_documents)}
    return index, ids, {n: index.document(n).group for n in ids}


def _build(rows, folder):
    from flexolmo_jax.tracing.build import build_index

    build_index([str(rows)], folder / "tokenizer.json", folder.with_name("grouped"), "pets")
    return folder.with_name("grouped")


@pytest.mark.parametrize("least", [1, 2, 4, 9])
def test_shared_lengths_are_those_of_counting_every_span(pets, least):
    index, ids, groups = pets
    draw = np.random.default_rng(least)
    for _ in range(2):
        text = " ".join(draw.choice(["cat", "dog", "cow", "the", "horse"], 10))
        [asked, *_] = as_asked(text, index.encode)
        own = asked.ids.tolist()
        expected = [
            max(
                n
                for n in range(len(own) - start + 1)
                if n == 0
                or len({groups[d] for d in ids if holds(ids[d], own[start : start + n])}) >= least
            )
            for start in range(len(own))
        ]
        assert shared_lengths(index, asked, least, LATER).tolist() == expected


def test_what_is_said_depends_on_shared_words_only(indexed):
    """Two indexes that differ in one document say the same of everything below the limit."""
    texts = [f"{n}: an old letter of our dear friend ends here" for n in "abc"]
    extra = "an old letter of our dear friend ends with a curse upon the house"
    said = []
    for more in ([], [extra]):
        index = Index.open(indexed([*texts, *more]))
        policy = Policy("counts", minimum_documents=2, minimum_tokens=1)
        spans = disclose(index, f"x {extra} y", policy, 0).spans
        said.append([(span.start, span.stop) for span in spans])
    assert said[0] == said[1] and said[0]


def test_without_limits_everything_is_said_that_an_index_finds(clinic, secret):
    index = Index.open(clinic)
    policy = Policy("snippets", minimum_documents=1, minimum_tokens=1)
    for text in (secret, f"Once {secret}. Nothing of this is said in the sixth report, is it?"):
        said, found = disclose(index, text, policy, 10**9).spans, trace(text, [index]).spans
        assert [(s.start, s.stop, s.counts) for s in said] == [
            (s.start, s.stop, s.counts) for s in found
        ]


def test_a_search_ends_in_time(clinic, secret):
    index = Index.open(clinic)
    [asked, *_] = as_asked(secret, index.encode)
    with pytest.raises(TooSlow):
        shared_lengths(index, asked, 2, time.monotonic() - 1)
    [asked, *_] = as_asked("Nothing of this is said in the sixth report", index.encode)
    with pytest.raises(TooSlow):  # also where nothing is shared
        shared_lengths(index, asked, 99, time.monotonic() - 1)


def test_the_attack_finds_members_where_everything_is_said(indexed):
    members = np.array([True, True, False, False])
    assert trace_membership.auc(np.array([2, 1, 1, 0]), members) == 7 / 8
    assert trace_membership.tpr(np.array([2, 1, 1, 0]), members) == 1 / 2
    text = "one two three four five"
    place = {"document": "d", "before": "zero two ", "after": " four six"}
    span = {"start": 8, "stop": 13, "tokens": 1, "log_probability": -3, "count": 4,
            "passages": [place]}  # fmt: skip
    scores = trace_membership.score(text, [(text, [span])])
    assert scores["context"] == len(" two ".removeprefix(" ")) + 1 + len(" four ")
    assert (scores["fewest"], scores["rarest"], scores["together"]) == (0.25, 3, 1)
