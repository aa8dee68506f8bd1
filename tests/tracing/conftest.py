"""Small indexes: words are tokens, so that a document is a list of numbers."""

import json
import os

import pytest
import tokenizers

from flexolmo_jax.tracing.build import build_index
from flexolmo_jax.tracing.index import Index

VOCABULARY = 12


def text_of(ids):
    return " ".join(map(str, ids))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def numbers_tokenizer(tmp_path_factory):
    """The file of a tokenizer of which the words "0" to "11" are tokens 0 to 11."""
    words = {str(number): number for number in range(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    file = tmp_path_factory.mktemp("numbers") / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.fixture
def index_numbers(tmp_path, numbers_tokenizer):
    """A function that writes documents of numbers, and builds an index of them."""

    def build(documents, name="index", **options):
        source = tmp_path / f"{name}.jsonl"
        rows = [{"text": text_of(d), "id": str(i)} for i, d in enumerate(documents)]
        source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        build_index([str(source)], numbers_tokenizer, tmp_path / name, **options)
        return tmp_path / name

    return build


@pytest.fixture
def open_numbers(index_numbers):
    return lambda *given, **options: Index.open(index_numbers(*given, **options))
