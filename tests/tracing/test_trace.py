"""Traces over indexes of several owners, and `flexolmo trace find`."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.runtime.console import columns
from flexolmo_jax.tracing.build import build_index
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.results import Passage, Span, Trace
from flexolmo_jax.tracing.table import show_trace
from flexolmo_jax.tracing.trace import find_matches, trace

OWNERS = {
    "code": ["Open the file. The parser reads every line of it.\nClose the file.", "Parser of it"],
    "math": ["A set is open. We say that the quick proof reads every line of it twice."],
    "news": [f"On day {i} the mayor of the town opened bridge {i} in the rain." for i in range(30)],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer.train([text for texts in OWNERS.values() for text in texts] * 3, 400)
    (folder / "tokenizer.json").write_text(made.json)
    return folder


def make_index(folder, owner, texts, tokenizer):
    source = folder / f"{owner}.jsonl"
    rows = [
        {"text": t, "source": f"{owner}/{i}", "licence": "CC0-1.0"} for i, t in enumerate(texts)
    ]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    build_index([str(source)], tokenizer / "tokenizer.json", folder / owner)
    return folder / owner


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes")
    return {name: make_index(folder, name, texts, tokenizer) for name, texts in OWNERS.items()}


@pytest.fixture(scope="module")
def indexes(folders):
    return [Index.open(folder) for folder in folders.values()]


def found(text, indexes, **options):
    return {text[s.start : s.stop]: s for s in trace(text, indexes, **options).spans}


def test_a_span_is_as_long_as_its_longest_match_with_any_owner(indexes):
    text = "The parser reads every line of it twice"
    spans = {text[m.start : m.stop] for m in find_matches(text, indexes)[0]}
    assert spans == {"The parser reads every line of it", "reads every line of it twice"}
    assert {t: s.counts for t, s in found("reads every line of it", indexes).items()} == {
        "reads every line of it": {"code": 1, "math": 1}
    }


def test_a_passage_shows_what_stands_around_a_match_and_whose_it_is(indexes):
    [span] = found("The parser reads every line of it.", indexes, prompt="lines").values()
    [passage] = span.passages
    assert (passage.owner, passage.source, passage.licence) == ("code", "code/0", "CC0-1.0")
    assert passage.before + passage.match + passage.after == OWNERS["code"][0]
    assert passage.match == "The parser reads every line of it."
    assert passage.score >= 0 and span.counts == {"code": 1}


@pytest.mark.parametrize("text", ["the mayor of the town", "The mayor? the mayor of the town"])
def test_counts_are_complete_and_documents_are_ten_at_most(indexes, text):
    span = found(text, indexes)["the mayor of the town"]
    assert span.counts == {"news": 30}
    assert len({p.document for p in span.passages}) == len(span.passages) == 10
    scores = [passage.score for passage in span.passages]
    assert scores == sorted(scores, reverse=True)


def test_a_sentence_is_found_whichever_place_it_has_in_a_document(indexes):
    for sentence in ("The parser reads every line of it.", "Close the file.", "A set is open."):
        for text in (sentence, f"So. {sentence}", f"So:\n{sentence} So."):
            assert sentence in {text[m.start : m.stop] for m in find_matches(text, indexes)[0]}


def test_prompt_and_answer_decide_which_document_comes_first(indexes):
    text = "the mayor of the town"
    for passage in found(text, indexes)[text].passages:
        bridge = re.search(r"bridge \d+", passage.after)[0]
        first, second = found(text, indexes, prompt=f"Who opened {bridge}?")[text].passages[:2]
        assert first.document == passage.document and first.score > second.score


WORDS = st.lists(st.sampled_from(["a", "b", "c,", "d.", "ef"]), min_size=1, max_size=9)


def occurrences(part, documents):
    """How often a text stands in documents, as whole words."""
    before, behind = (
        (r"(?<!\w)" if part[0].isalnum() else ""),
        r"(?!\w)" if part[-1].isalnum() else "",
    )
    pattern = re.compile(f"(?={before}{re.escape(part)}{behind})")
    return sum(len(pattern.findall(document)) for document in documents)


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=WORDS, owners=st.lists(st.lists(WORDS, min_size=1, max_size=4), min_size=1, max_size=3))
def test_spans_equal_brute_force_over_characters(text, owners, tokenizer, tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("random"), " ".join(text)
    # Within a sentence a word is looked for with the space before it, which no first word has.
    texts = [[" ".join(["zz", *words]) for words in documents] for documents in owners]
    opened = [
        Index.open(make_index(folder, f"o{i}", documents, tokenizer))
        for i, documents in enumerate(texts)
    ]
    documents = [document for own in texts for document in dict.fromkeys(own)]
    edges = [i for i in range(len(text) + 1) if not re.match(r"\w\w", text[max(0, i - 1) : i + 1])]
    allowed = [
        (i, j)
        for i in edges
        for j in edges
        if i < j and text[i] not in " ,." and not text[j - 1].isspace()
        and not re.search(r"\.(?=\s)", text[i : j - 1] + " " * (j < i))
        and occurrences(text[i:j], documents)
    ]  # fmt: skip
    expected = [
        (i, j)
        for i, j in allowed
        if not any(a <= i and j <= b and (a, b) != (i, j) for a, b in allowed)
        and re.search(r"\w", text[i:j])
    ]
    spans = find_matches(text, opened)[0]
    assert [(m.start, m.stop) for m in spans] == expected
    for match in spans:
        count = sum(index.find(ids)[0] for index in opened for ids in match.forms)
        assert count == occurrences(text[match.start : match.stop], documents)


@pytest.mark.parametrize("answer", ["", " \n", "...", "unheard-of"])
def test_an_answer_of_which_no_word_stands_anywhere_has_no_spans(indexes, answer):
    result = trace(answer, indexes)
    assert result.spans == () and result.asked == tuple(OWNERS)


def test_wrong_input_ends_in_one_line(folders, tokenizer, refused, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(Tokenizer.train(["ab ab ab cd"], 260).json)
    foreign = make_index(tmp_path, "foreign", ["ab cd"], other)
    code = folders["code"]
    for words, message in (
        (("...", "--index", code), "has no word"),
        (("", "--index", code), "has no word"),
        (("x", "--index", code, foreign), "made with another tokenizer"),
        (("x", "--index", code, code), "given twice"),
        (("x", "--index", tmp_path / "missing"), "found no folder"),
        (("x", "--index", code, "--without", "math"), "--without: expected owners"),
        (("x", "--index", code, "--without", "code"), "nothing is left to search"),
        (("x", "--index", code, "--similar", "-1"), "0 or more"),
        (("x", "--file", "y", "--index", code), "found TEXT and --file"),
        (("--index", code), "found none"),
        (("--model", "m", "--index", code), "expected --prompt"),
        (("--file", tmp_path / "missing", "--index", code), "--file: expected a file"),
    ):
        assert message in refused("trace", "find", *words), words


def test_the_command_shows_counts_before_documents_on_80_columns(
    flexolmo, folders, monkeypatch, capfd
):
    monkeypatch.setattr("flexolmo_jax.runtime.console.console.width", 80)
    text = "So the mayor of the town reads every line of it twice, in a zoo of 18 axolotls"
    code, out, _ = flexolmo("trace", "find", text, "--index", *folders.values())
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert "30 times: news 30" in out and "and 7 more" in out
    assert out.index("30 times: news 30") < out.index("news.jsonl")
    assert "no proof of a cause" in out and "because" not in out
    wide = Passage("news", "1", before="\u200d" * 30, match="日本語" * 9, after="👩" * 60)
    show_trace(Trace("日本語" * 9, (Span(0, 27, 9, -9.0, {"news": 1}, (wide,)),), asked=("news",)))
    shown = capfd.readouterr().out
    assert r"\u200d" in shown and max(map(columns, shown.splitlines())) <= 80
    assert [line.startswith("      ") for line in shown.splitlines()].count(True) == 1
    code, out, _ = flexolmo("trace", "find", "unheard", "--index", folders["math"])
    assert code == 0 and "No word of the text stands verbatim" in out


def test_json_and_files_and_an_owner_left_out(flexolmo, folders, tmp_path):
    file = tmp_path / "answer.txt"
    file.write_text("reads every line of it", encoding="utf-8")
    words = ("trace", "find", "--file", file, "--index", *folders.values(), "--json")
    _, out, _ = flexolmo(*words)
    assert json.loads(out)["spans"][0]["counts"] == {"code": 1, "math": 1}
    _, out, _ = flexolmo(*words, "--without", "math")
    assert json.loads(out)["asked"] == ["code", "news"] and "math" not in out


def test_the_similar_are_no_verbatim_ones_and_at_most_one_of_a_document(indexes):
    pytest.importorskip("wordllama")
    text = "A bridge was opened by our city's leader"
    said = trace(text, indexes, similar=3).similar
    assert [passage.owner for passage in said] == ["news"] * 3
    assert len({passage.document for passage in said}) == 3
    exact = OWNERS["news"][4]
    result = trace(exact, indexes, similar=30)
    named = {passage.document for span in result.spans for passage in span.passages}
    assert named and named.isdisjoint({passage.document for passage in result.similar})


def test_a_withdrawn_document_is_neither_counted_nor_named(flexolmo, tokenizer, tmp_path):
    folder = make_index(tmp_path, "news", OWNERS["news"], tokenizer)
    [span] = found("the mayor of the town", [Index.open(folder)]).values()
    taken = [passage.document for passage in span.passages]
    assert flexolmo("trace", "withdraw", folder, "--document", *taken)[0] == 0
    [span] = found("the mayor of the town", [Index.open(folder)]).values()
    assert span.counts == {"news": 20}
    assert not {passage.document for passage in span.passages} & set(taken)
