"""Long texts in pieces: the same tokens as whole ones, for a small multiple of a piece's memory."""

import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from flexolmo_jax.data import pieces, windows
from flexolmo_jax.data.sources import Document, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer

ADDED = ["<|endoftext|>", "two words", "a|b"]


def byte_level(pattern):
    if pattern == pieces.GPT_2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def trained(pre_tokenizer, **changes):
    """A byte-level BPE that has learned from real text, with tokens added."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    for name, value in changes.items():
        setattr(made, name, value)
    texts = [d.text for d, _ in zip(read_documents("corpus:code"), range(60), strict=False)]
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.add_special_tokens(ADDED[:1])
    made.add_tokens(ADDED[1:])
    return made


@pytest.fixture(scope="module", params=pieces.WORDS, ids=["gpt2", "llama3", "qwen2"])
def known(request):
    return trained(byte_level(request.param))


def assert_same_tokens(tokenizer, text, size):
    cut = cut_at(text, tokenizer, size)
    assert "".join(cut) == text
    ids = [i for piece in cut for i in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    return cut


def cut_at(text, tokenizer, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", size)
        return pieces.in_pieces(text, tokenizer.to_str())


PARTS = [*ADDED, "word", "It's", "WE'LL", "  ", " ", "\n", "\r\n", "\t", "12345", "x1", "é"]
PARTS += ["e\u0301", "ſ", "'ſ", "ß", "中文", "，", "。", "١٢", "…", "!?", "\u00a0", "\u3000"]  # noqa: RUF001
PARTS += ["\0", "_", "👍🏽", "ﬆ", "²"]


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=40))
def test_pieces_have_the_tokens_of_the_whole(known, parts):
    assert_same_tokens(known, "".join(parts), 3)


def test_real_text_of_every_domain_has_the_same_tokens_in_pieces(known):
    for domain in ("public", "code", "math", "creative"):
        documents = read_documents(f"corpus:{domain}")
        text = "\n".join(d.text for d, _ in zip(documents, range(40), strict=False))
        assert len(assert_same_tokens(known, text, 50)) > len(text) / 120


@pytest.mark.parametrize("text", ["2024-01-02 03:04:05,6\n", "Zm9v/YmFy+", "中文，没有空格。"])  # noqa: RUF001
def test_text_without_words_of_letters_and_spaces_is_cut_too(known, text):
    assert len(assert_same_tokens(known, text * 50, 20)) > 10


def test_a_cut_never_runs_through_a_token_that_was_added(known):
    cut = cut_at("two words a|b <|endoftext|>" * 50, known, 2)
    assert len(cut) > 40
    assert not any(piece.endswith(("two", "a", "endoftext")) for piece in cut[:-1])


NOT_KNOWN = {
    "composed": trained(byte_level(pieces.GPT_2), normalizer=normalizers.NFC()),
    "another pattern": trained(byte_level(r"\p{L}+ ?|.")),
    "spaces": trained(pre_tokenizers.Metaspace()),
    "prefix": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no words": trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
}


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_other_tokenizers_are_given_their_texts_whole(name):
    assert len(cut_at("some words, and more of them " * 20, NOT_KNOWN[name], 3)) == 1


def test_a_token_that_takes_spaces_beside_it_keeps_texts_whole():
    greedy = trained(byte_level(pieces.GPT_2))
    greedy.add_tokens([AddedToken("MASK", rstrip=True)])
    assert len(cut_at("some words MASK and more of them " * 20, greedy, 3)) == 1


def test_of_a_long_document_only_some_pieces_are_encoded_at_a_time(monkeypatch):
    tokenizer = Tokenizer.train(["the stone house walks under morning"] * 3, 300)
    words = "the stone house walks, quiet; it's morning\n".split(" ")
    draw = random.Random(0)
    long = " ".join(draw.choice(words) for _ in range(10_000))
    monkeypatch.setattr(pieces, "PIECE", 256)
    monkeypatch.setattr(windows, "BATCH_CHARACTERS", 8 * 256)
    encode, asked = tokenizer.encode_documents, []

    def watched(texts, *more):
        asked.append(sum(map(len, texts)))
        return encode(texts, *more)

    monkeypatch.setattr(tokenizer, "encode_documents", watched)
    documents = [Document(text, text) for text in ("short", long, "short", *["x" * 1000] * 9)]
    ids = list(windows.tokenized(documents, tokenizer))
    assert len(long) > 20 * windows.BATCH_CHARACTERS and max(asked) < 1.1 * windows.BATCH_CHARACTERS
    assert len(asked) == 1 + -(-len(long) // (8 * 259)) + 5 and len(ids) == len(documents)
    assert all(one.dtype == np.int32 for one in ids)
    for one, document in zip(ids, documents, strict=True):
        assert one.tolist() == encode([document.text])[0]


def test_the_tokenizer_file_is_what_is_looked_at():
    fields = json.loads(trained(byte_level(pieces.LLAMA_3)).to_str())
    assert pieces.in_pieces("word " * 100_000, json.dumps(fields)) != ["word " * 100_000]
    fields["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0}
    assert pieces.in_pieces("word " * 100_000, json.dumps(fields)) == ["word " * 100_000]
