"""The studies of traces, on small indexes and without training."""

import json

import pytest

from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.studies import trace_similar
from flexolmo_jax.studies.trace_memorized import Counts, count, pick_sentences
from flexolmo_jax.tracing.build import build_index
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.trace import of_owners, trace

SENTENCES = [
    f"The {colour} mill number {number} burned down in a cold night of the year, and nobody saw it."
    for number, colour in enumerate(["old", "red", "new", "tall"])
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with a tokenizer and the indexes of two owners."""
    folder = tmp_path_factory.mktemp("demo")
    made = Tokenizer.train(SENTENCES * 3, 400)
    (folder / "tokenizer.json").write_text(made.json)
    for name, texts in (
        ("code", ["So. " + " ".join(SENTENCES) + " End"]),
        ("math", ["A set " * 50]),
    ):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in texts)
        )
        build_index(
            [str(folder / f"{name}.jsonl")], folder / "tokenizer.json", folder / "indexes" / name
        )
    return folder


class Parrot:
    """In place of models: says what it knows, and traces as models do."""

    def __init__(self, known):
        self.known = known

    def generate(self, prompts, max_new_tokens):
        return [next((k[len(p) :] for k in self.known if k.startswith(p)), "no") for p in prompts]

    def trace(self, text, indexes, *, prompt, without):
        used = [name for name in ("code", "math") if name not in without]
        return trace(text, of_owners(indexes, used, ("code", "math")), prompt=prompt)


def test_what_was_memorized_is_found_and_an_owner_that_is_off_is_not_named(demo):
    tokenizer = Tokenizer.load(demo / "tokenizer.json")
    indexes = [Index.open(demo / "indexes" / name) for name in ("code", "math")]
    texts = iter(["A " + " ".join(SENTENCES) + " "])
    assert list(pick_sentences(texts, tokenizer)) == SENTENCES
    model = Parrot(SENTENCES[:3])
    lengths = [len(tokenizer.encode_prompt(s)) for s in SENTENCES]
    assert count("code", SENTENCES, lengths, model, model, indexes) == Counts(3, 3, 3, 0)
    model.trace = lambda text, indexes, **_: trace(text, indexes)  # one that names all
    assert count("code", SENTENCES, lengths, model, model, indexes).others == 4


def test_changed_passages_are_looked_for(demo, study, tmp_path, monkeypatch):
    pytest.importorskip("wordllama")
    monkeypatch.setattr(trace_similar, "OWNERS", ())
    monkeypatch.setattr(trace_similar, "WORDS", 20)
    (demo / "indexes" / "public").symlink_to(demo / "indexes" / "code")
    page = tmp_path / "page.md"
    page.write_text("<!-- similar -->\n<!-- end of similar -->\n")
    study("trace-similar", demo, "--page", page)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 3 * len(trace_similar.CHANGES)
    assert all(row.endswith("100% | 100% | 100% |") for row in rows[2:])  # of one document
