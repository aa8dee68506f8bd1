"""Tokenizers of others, and texts that spell control tokens: a text is only ever text."""

import json
import unicodedata

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.data.tokenizer import SEPARATOR, Tokenizer
from flexolmo_jax.privacy.canaries import Canaries

TEXTS = [document.text for document in read_documents("corpus:public")][:40]
SPELLED = ["a <|endoftext|> b", "<|endoftext|>", "<|pad|>", f"x{SEPARATOR * 3}\n{SEPARATOR}y"]


def bytes_bpe(special=(SEPARATOR, "<|pad|>")):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def sentencepiece(scheme="always"):
    """Of small letters and spaces only, as SentencePiece without byte fallback."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(
        ["the river runs under a stone house", "mild green paper lamps"], trainer
    )
    return made


def like_llama():
    """Spaces become characters in the normalizer, and unknown characters bytes."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    all_bytes = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>", *all_bytes], show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    saved = json.loads(made.to_str())
    saved["added_tokens"] = saved["added_tokens"][:2]  # bytes are ordinary pieces
    return tokenizers.Tokenizer.from_str(json.dumps(saved))


# What spells a control token


@pytest.mark.parametrize("kind", ["special", "ordinary", "not listed"])
@pytest.mark.parametrize("text", SPELLED)
def test_what_spells_a_control_token_is_text(kind, text):
    """However the file has the separator: as special, as added, or in the vocabulary only."""
    made = bytes_bpe(() if kind == "ordinary" else (SEPARATOR, "<|pad|>"))
    made.add_tokens([SEPARATOR, "<|pad|>"] if kind == "ordinary" else [])
    saved = json.loads(made.to_str())
    if kind == "not listed":
        saved["added_tokens"] = []
    tokenizer = Tokenizer(json.dumps(saved))
    (ids,) = tokenizer.encode_documents([text], whole=True)
    assert ids[0] == tokenizer.separator and tokenizer.separator not in ids[1:]
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator not in tokenizer.encode_prompt(text)
    assert tokenizer.decode(tokenizer.encode_prompt(text)) == text


@pytest.mark.parametrize("text", SPELLED)
def test_only_what_a_tokenizer_puts_in_front_is_a_control_token(text, tmp_path):
    made = Tokenizer.train(TEXTS, 300)
    (tmp_path / "tokenizer.json").write_text(made.json, encoding="utf-8")
    for tokenizer in (made, Tokenizer.load(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode_prompt(text)
        assert ids[0] == tokenizer.separator and ids.count(tokenizer.separator) == 1
        assert tokenizer.decode(ids) == text and ids == tokenizer.encode_documents([text])[0]
        harness = tokenizer.encode_as_transformers(SEPARATOR, opened=False)
        assert harness == [tokenizer.separator]


def test_what_a_tokenizer_puts_behind_a_text_does_not_end_a_prompt():
    """As fine-tuning with an end behind each text leaves it; what stands in front stays."""
    made = bytes_bpe(["<s>", "</s>"])
    pieces = [("<s>", 0), ("</s>", 1)]
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=pieces
    )
    tokenizer = Tokenizer(made.to_str(), "</s>")
    own = made.encode("the river", add_special_tokens=False).ids
    assert tokenizer.encode_prompt("the river") == [0, *own]
    assert tokenizer.encode_documents(["the river"]) == [[1, *own]]


@pytest.mark.parametrize(
    "field", ["normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"]
)
def test_a_field_that_a_tokenizer_json_leaves_out_is_null(field):
    """As the library reads it; other programs write no nulls."""
    saved = json.loads(bytes_bpe().to_str())
    null = Tokenizer(json.dumps({**saved, field: None})).encode_documents(["x"])
    del saved[field]
    assert Tokenizer(json.dumps(saved)).encode_documents(["x"]) == null


def test_added_tokens_that_are_not_special_are_text_as_before():
    made = bytes_bpe()
    made.add_tokens(["<|user|>"])
    tokenizer = Tokenizer(made.to_str())
    (ids,) = tokenizer.encode_documents(["say <|user|> now"], whole=True)
    assert made.token_to_id("<|user|>") in ids and tokenizer.decode(ids) == "say <|user|> now"


def test_a_tokenizer_that_cannot_spell_a_control_token_says_so():
    """A Unigram model has it among its pieces, and would choose it for its characters."""
    tokenizer = Tokenizer(sentencepiece().to_str(), "</s>")
    said = "the text spells '</s>', a control token .near 'stone </s> house'., and this tokenizer"
    with pytest.raises(ValueError, match=f"own.jsonl:2: {said}"):
        tokenizer.encode_documents(["a river", "stone </s> house"], ["own.jsonl:1", "own.jsonl:2"])
    with pytest.raises(ValueError, match=f"the prompt: {said}"):
        tokenizer.encode_prompt("stone </s> house")


# What a tokenizer.json says beside the vocabulary


@pytest.mark.parametrize("pretty", [True, False])
@pytest.mark.parametrize("kept", ["truncation", "padding", "dropout", "all"])
def test_truncation_padding_and_dropout_change_nothing(kept, pretty):
    """Neither ids nor digest: the files are one tokenizer."""
    made = bytes_bpe()
    plain = made.to_str(pretty)
    if kept in ("truncation", "all"):
        made.enable_truncation(max_length=8, stride=2)
    if kept in ("padding", "all"):
        made.enable_padding(pad_id=1, pad_token="<|pad|>", length=4096)
    saved = made.to_str(pretty)
    if kept in ("dropout", "all"):
        saved = saved.replace('"dropout": null', '"dropout": 0.5')
        saved = saved.replace('"dropout":null', '"dropout":0.5')
    assert saved != plain
    one, other = Tokenizer(plain), Tokenizer(saved)
    assert other.encode_documents(TEXTS[:9]) == one.encode_documents(TEXTS[:9])
    assert other.encode_prompt(TEXTS[0]) == one.encode_prompt(TEXTS[0])
    assert one.json == plain == other.json and other.digest == one.digest


def test_ids_without_an_embedding_are_refused():
    made = bytes_bpe()
    size = made.get_vocab_size()
    made.add_special_tokens(["[PAD]"])
    made.add_tokens(["<|user|>"])
    tokenizer = Tokenizer(made.to_str(), embeddings=size)
    assert tokenizer.decode(tokenizer.encode_documents(["a [PAD] b"])[0]) == "a [PAD] b"
    said = f"the token '<|user|>' has id {size + 1}, and the model has embeddings for ids below"
    with pytest.raises(ValueError, match=f"chat.jsonl:7: {said} {size} only".replace("|", r"\|")):
        tokenizer.encode_documents(["a", "x <|user|>"], ["chat.jsonl:6", "chat.jsonl:7"])
    with pytest.raises(ValueError, match="the prompt: the token"):
        tokenizer.encode_prompt("<|user|> hello")
    with pytest.raises(ValueError, match="a text: the token"):
        tokenizer.encode_as_transformers("a [PAD] b", opened=False)
    with pytest.raises(ValueError, match=f"has id {size}, .* below {size} only; .*--separator"):
        Tokenizer(made.to_str(), "[PAD]", embeddings=size)
    for canary in Canaries.draw(50, tokenizer).candidates:
        assert tokenizer.encode_documents([canary.text])


def test_a_post_processor_that_puts_in_an_id_without_an_embedding_is_refused():
    made = bytes_bpe()
    size = made.get_vocab_size()
    made.add_special_tokens(["<s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", size)]
    )
    with pytest.raises(ValueError, match="the prompt: the token '<s>' has id"):
        Tokenizer(made.to_str(), embeddings=size).encode_prompt("hello")


# Tokenizers that do not write every byte


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_continuation_keeps_its_first_space(scheme):
    tokenizer = Tokenizer(sentencepiece(scheme).to_str(), "</s>")
    ids = tokenizer.encode_prompt("the river runs under a stone house")
    start = len(tokenizer.encode_prompt("the river runs"))
    assert tokenizer.decode(ids[:start]) == "the river runs"
    assert tokenizer.decode_after(ids[:start], ids[start:]) == " under a stone house"
    assert tokenizer.decode_after([], ids) == "the river runs under a stone house"


def test_a_continuation_may_begin_within_a_character():
    tokenizer = Tokenizer(bytes_bpe().to_str())
    ids = tokenizer.encode_prompt("né")
    assert tokenizer.decode_after(ids[:-1], ids[-1:]) == tokenizer.decode(ids[-1:])
    assert tokenizer.decode_after(ids[:1], ids[1:]) == "é"


@pytest.mark.parametrize("text", ["the river runs", " a stone", "a  river", "  mild lamps"])
def test_ordinary_text_is_whole_for_sentencepiece(text):
    for scheme in ("always", "first", "never"):
        tokenizer = Tokenizer(sentencepiece(scheme).to_str(), "</s>")
        tokenizer.encode_documents([text], whole=True)
    Tokenizer(like_llama().to_str(), "</s>").encode_documents([text, "é☃ </s>\n"], whole=True)


def wordpiece():
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def lower_case():
    made = bytes_bpe()
    made.normalizer = normalizers.Lowercase()
    return made


def with_greedy_token():
    """An added token that is no control token, and takes the space before it away."""
    made = bytes_bpe()
    made.add_tokens([tokenizers.AddedToken("[INST]", lstrip=True)])
    return made


def without_unknown():
    """A BPE of characters that drops the others silently."""
    made = tokenizers.Tokenizer(models.BPE())
    made.train_from_iterator(["the river </s>"], trainers.BpeTrainer(show_progress=False))
    made.add_special_tokens(["</s>"])
    return made


@pytest.mark.parametrize(
    ("make", "separator", "text", "said"),
    [
        (sentencepiece, "</s>", "the é river", r"cannot write 'é' \(U\+00E9\)"),
        (sentencepiece, "</s>", "é" * 50, r"cannot write 'é' \(U\+00E9\)"),
        (sentencepiece, "</s>", "the river <unk>", "cannot write '<'"),
        (wordpiece, "[SEP]", "the ☃ river", "cannot write '☃'"),
        (wordpiece, "[SEP]", "the  river", r"makes 'the river' of 'the  river'"),
        (lower_case, SEPARATOR, "The river", "cannot write 'T'"),
        (lower_case, SEPARATOR, "the river tT", "cannot write 'T'"),
        (without_unknown, "</s>", "the ☃ river", "cannot write '☃'"),
        (with_greedy_token, SEPARATOR, "the [INST] river", r"makes 'the\[INST\] river' of"),
    ],
)
def test_text_that_is_lost_is_named(make, separator, text, said):
    """Refused where bytes are counted; else there is a warning of the first such text."""
    tokenizer = Tokenizer(make().to_str(), separator)
    with pytest.raises(ValueError, match=f"own.jsonl:3: the tokenizer {said}.*bits per byte"):
        tokenizer.encode_documents([text], ["own.jsonl:3"], whole=True)
    with pytest.warns(UserWarning, match=f"own.jsonl:3: the tokenizer {said}") as warned:
        tokenizer.encode_documents([text], ["own.jsonl:3"])
        tokenizer.encode_documents([text], ["own.jsonl:3"])
    assert len(warned) == 1


def test_composed_text_is_counted_as_it_is_read():
    made = bytes_bpe()
    made.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(made.to_str())
    text = unicodedata.normalize("NFD", "café 각")
    assert tokenizer.decode(tokenizer.encode_documents([text], whole=True)[0]) == "café 각"
    assert tokenizer.size(text) == len("café 각".encode()) < len(text.encode())
    assert Tokenizer(bytes_bpe().to_str()).size(text) == len(text.encode())


def test_a_prompt_that_is_not_utf_8_is_refused():
    with pytest.raises(ValueError, match=r"the prompt is not valid UTF-8 .*'caf\\udce9'"):
        Tokenizer(bytes_bpe().to_str()).encode_prompt(b"caf\xe9".decode(errors="surrogateescape"))
