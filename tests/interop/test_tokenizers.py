"""Tokenizers and ends of text of Hugging Face folders, from training to a merged model."""

import importlib.util
import json

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.data.tokenizer import SEPARATOR, Tokenizer
from flexolmo_jax.evaluation.bits_per_byte import bits_per_byte
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.interop import hf_import
from flexolmo_jax.model import load

VOCAB, WIDTH, FFN = 320, 16, 24
TEXTS = [document.text for document in read_documents("corpus:public")][:60]
CONFIG = {
    "model_type": "olmo2", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": FFN,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "hidden_act": "silu", "attention_bias": False,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "tie_word_embeddings": False,
}  # fmt: skip
NEEDS_TRANSFORMERS = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="needs the extra `reference`"
)


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def bytes_bpe(*special):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(TEXTS, trainer)
    return made


def sentencepiece(*special):
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


@pytest.fixture
def folder(tmp_path):
    """A random OLMo 2 model with the tokenizer of ours that names its end of text nowhere."""
    random = np.random.default_rng(0)

    def weight(*shape):
        return random.normal(0, 0.1, shape).astype(np.float32)

    layer, ones = "model.layers.0.", np.ones(WIDTH, np.float32)
    tensors = {
        name: weight(VOCAB, WIDTH) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    tensors |= {f"{layer}self_attn.{name}_proj.weight": weight(WIDTH, WIDTH) for name in "qkvo"}
    tensors |= {f"{layer}mlp.{name}_proj.weight": weight(FFN, WIDTH) for name in ("gate", "up")}
    tensors |= {f"{layer}mlp.down_proj.weight": weight(WIDTH, FFN), "model.norm.weight": ones}
    tensors |= {f"{layer}self_attn.{name}_norm.weight": ones for name in "qk"}
    tensors |= {f"{layer}post_{n}_layernorm.weight": ones for n in ("attention", "feedforward")}
    made = tmp_path / "model"
    made.mkdir()
    save_file(tensors, made / "model.safetensors")
    write(made / "config.json", CONFIG)
    bytes_bpe("</s>", "<|pad|>").save(str(made / "tokenizer.json"))
    return made


def test_where_the_name_of_the_separator_comes_from(folder):
    assert hf_import.separator(folder) == SEPARATOR
    write(folder / "config.json", {**CONFIG, "eos_token_id": [1, 0]})
    assert hf_import.separator(folder) == "<|pad|>"
    write(folder / "generation_config.json", {"eos_token_id": 0})
    assert hf_import.separator(folder) == "</s>"
    write(folder / "special_tokens_map.json", {"eos_token": {"content": "<|pad|>"}})
    assert hf_import.separator(folder) == "<|pad|>"
    write(folder / "tokenizer_config.json", {"eos_token": None})
    assert hf_import.separator(folder) == "<|pad|>"
    write(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    assert hf_import.separator(folder) == "</s>"
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json: cannot be read as a JSON object"):
        hf_import.separator(folder)


@pytest.mark.parametrize(
    "ends", [{"generation_config.json": "second"}, {"config.json": "first and second"},
             {"config.json": "first", "generation_config.json": "second"}],
)  # fmt: skip
@pytest.mark.parametrize("tokenizer", [True, False])
def test_generation_ends_at_any_end_that_the_folder_names(folder, ends, tokenizer):
    prompts = [[40, 41, 42], [50], [60, 61]]
    write(folder / "special_tokens_map.json", {"eos_token": "</s>"})
    if not tokenizer:
        (folder / "tokenizer.json").unlink()
    whole = load(folder).generate(prompts, 12)
    assert all(len(ids) == 12 for ids in whole)
    ids = {"first": whole[0][7], "second": whole[0][3]}
    named = set()
    for file, names in ends.items():
        found = [ids[name] for name in names.split(" and ")]
        named |= {*found}
        given = {"eos_token_id": found if len(found) > 1 else found[0]}
        write(folder / file, {**CONFIG, **given} if file == "config.json" else given)
    cut = [row[: next((n for n, x in enumerate(row) if x in named), 12)] for row in whole]
    model = load(folder)
    assert model.generate(prompts, 12) == cut and len(cut[0]) <= 3
    assert sum(model.stream(prompts[0], 12, interval=5), []) == cut[0]


def test_ends_that_are_no_ids_are_refused(folder):
    write(folder / "special_tokens_map.json", {"eos_token": "</s>"})
    for wrong in ("</s>", [1, "x"], True):
        write(folder / "generation_config.json", {"eos_token_id": wrong})
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id: expected a n"):
            load(folder)
    write(folder / "generation_config.json", {"eos_token_id": [VOCAB + 7, -1]})
    assert len(load(folder).generate([[5]], 4)[0]) == 4


def test_a_separator_is_named_once_and_kept(folder, world, flexolmo, refused, tmp_path):
    """At training; the package and a model that is merged from it remember it, and the ends."""
    evaluate = ("evaluate", "--data", f"x={world.texts['math']}", "--json", "--model")
    said = refused(*evaluate, folder)
    assert "no token '<|endoftext|>'" in said and "--separator" in said and "'</s>'" in said
    assert "no token 'nothing'" in refused(*evaluate, folder, "--separator", "nothing")
    out = tmp_path / "mine"
    command = (
        "train", "expert", world.config_file("alone"), "--data", world.texts["math"],
        "--public", world.texts["public"], "--anchor", folder, "--name", "mine", "--out", out,
        "--steps", "2",
    )  # fmt: skip
    assert "--separator" in refused(*command)
    code, _, error = flexolmo(*command, "--separator", "</s>")
    assert code == 0, error
    merged = tmp_path / "merged"
    assert flexolmo("merge", "--anchor", folder, "--expert", out, "--out", merged)[0] == 0
    merge(folder, [], tmp_path / "other", separator="<|pad|>")
    said = refused("experts", "add", tmp_path / "other", out)
    assert "trained with the separator '</s>', and" in said and "has '<|pad|>'" in said
    plain = load(merged).generate([[40, 41]], 8)[0]
    write(folder / "generation_config.json", {"eos_token_id": [0, plain[2]]})
    for path in (merged, out):
        model = load(path, anchor=folder)
        assert model.tokenizer.separator_text == "</s>"
        assert model.ends == (0, plain[2])
    assert load(merged).generate([[40, 41]], 8)[0] == plain[: plain.index(plain[2])]
    assert load(folder, separator="</s>").tokenizer.separator_text == "</s>"
    code, printed, _ = flexolmo(*evaluate, folder, "--separator", "</s>")
    assert code == 0 and json.loads(printed)[0]["bits_per_byte"] > 1
    audit = ("audit", "removal", "--model", merged, "--expert", "mine", "--prefixes", "2")
    code, _, error = flexolmo(*audit, "--data", world.texts["math"])
    assert code == 0, error
    said = refused(*evaluate, world.anchor, "--separator", "</s>")
    assert "trained with the separator '<|endoftext|>'" in said


def test_the_model_of_a_folder_with_truncation_is_scored_as_without(folder, world):
    write(folder / "special_tokens_map.json", {"eos_token": "</s>"})
    plain = bits_per_byte(load(folder), str(world.texts["math"]))
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.enable_truncation(max_length=8)
    made.enable_padding(length=99, pad_id=1, pad_token="<|pad|>")
    made.save(str(folder / "tokenizer.json"))
    assert bits_per_byte(load(folder), str(world.texts["math"])) == plain


def test_documents_that_the_model_cannot_read_are_named_by_every_command(
    folder, world, refused, tmp_path
):
    """An id beyond the embedding; nothing is trained, and no number is printed."""
    write(folder / "special_tokens_map.json", {"eos_token": "</s>"})
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens([f"<|t{number}|>" for number in range(VOCAB)])
    made.save(str(folder / "tokenizer.json"))
    rows = [*TEXTS[:9], f"say <|t{VOCAB - 1}|> now"]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    train = (
        "train", "expert", world.config_file("alone"), "--anchor", folder, "--name", "x",
        "--steps", "2", "--data.heldout", "0", "--out", tmp_path / "out",
    )  # fmt: skip
    public = ("--public", world.texts["public"])
    audit = ("audit", "extraction", "--data", chat, "--out", tmp_path / "audit", "--prefixes", "2")
    for command in (
        ("evaluate", "--model", folder, "--data", f"x={chat}"),
        (*train, *public, "--data", chat),
        (*train, *public, "--data", chat, "--dp-epsilon", "8", "--dp-delta", "0.01"),
        (*audit, "--model", folder),
    ):
        said = refused(*command)
        assert f"'<|t{VOCAB - 1}|>' has id" in said and f"ids below {VOCAB} only" in said
        assert "chat.jsonl:10" in said
        assert not (tmp_path / "out").exists()
    chat.write_text(json.dumps({"text": rows[-1]}) + "\n")
    own = ("--data", world.texts["math"], "--public", chat, "--run", tmp_path / "run")
    for privacy in ((), ("--dp-epsilon", "8", "--dp-delta", "0.01")):
        said = refused(*train, *own, *privacy)  # before the training that it is needed after
        assert f"'<|t{VOCAB - 1}|>' has id" in said
        assert not (tmp_path / "run").exists()
    said = refused("generate", "--model", folder, "--prompt", f"<|t{VOCAB - 1}|>")
    assert f"the prompt: the token '<|t{VOCAB - 1}|>' has id" in said


def test_a_sentencepiece_model_continues_with_the_space(folder):
    """Continuations are what continues the whole text, streamed or not."""
    write(folder / "special_tokens_map.json", {"eos_token": "</s>"})
    sentencepiece("</s>").save(str(folder / "tokenizer.json"))
    model = load(folder)
    with_space = 0
    for text in ("the theorem", "A river", "of", "we", "to", "and the"):
        ids = model.tokenizer.encode_prompt(text)
        (made,) = model.generate([ids], 12, temperature=1.0)
        (found,) = model.generate([text], 12, temperature=1.0)
        assert model.tokenizer.decode([*ids, *made]) == text + found
        assert "".join(model.stream(text, 12, temperature=1.0, interval=1)) == found
        with_space += found.startswith(" ")
        if found.strip():
            cut = found.strip()[0]
            assert model.generate([text], 12, temperature=1.0, until=[cut]) == [found.split(cut)[0]]
    assert with_space


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_ids_of_ordinary_text_are_those_of_transformers(kind, tmp_path):
    from transformers import PreTrainedTokenizerFast

    made = (bytes_bpe if kind == "bytes" else sentencepiece)("</s>", "<|pad|>")
    made.add_tokens(["<|user|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>", pad_token="<|pad|>"
    )
    ours = Tokenizer.load(tmp_path / "tokenizer.json", "</s>")
    texts = [*TEXTS[:20], "<|user|> the theorem <|user|>", "café ☃" if kind == "bytes" else "the"]
    for text in texts:
        expected = theirs(text)["input_ids"]
        assert ours.encode_prompt(text) == expected == ours.encode_documents([text])[0][1:]
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    spelled = "a </s> b<|pad|>"
    assert ours.encode_as_transformers(spelled, opened=True) == theirs(spelled)["input_ids"]
    if kind == "bytes":
        by_characters = theirs(spelled, split_special_tokens=True)["input_ids"]
        assert ours.encode_prompt(spelled) == by_characters
