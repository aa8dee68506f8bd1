"""Hugging Face models: live parity with transformers, layouts, and what is refused."""

import functools
import importlib.util
import itertools
import json
import runpy
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.interop import hf_import
from flexolmo_jax.model import load
from flexolmo_jax.modeling.transformer import forward
from flexolmo_jax.storage.tensors import named

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

needs_torch = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="needs torch and transformers; test_golden.py holds their numbers",
)


# Compiled without most optimizations here, and in test_golden.py as in use.
@functools.partial(jax.jit, static_argnames="config")
def logits(backbone, experts, tokens, segments, config):
    out = forward(backbone, (experts,), tokens, config, segments=segments)
    return backbone.logits(out.hidden, config)


def flex(**fields):
    return "flex_olmo", fields


def olmo2(**fields):
    return "olmo2", fields


def rope(theta):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


MODELS = [
    flex(num_experts=1, num_experts_per_tok=1),
    flex(num_experts=2, num_experts_per_tok=1, num_key_value_heads=2, **rope(1e4)),
    flex(num_experts=3, num_experts_per_tok=3, tie_word_embeddings=True, head_dim=6),
    flex(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, hidden_size=24),
    flex(num_experts=5, num_experts_per_tok=1, norm_topk_prob=True, rms_norm_eps=1e-3),
    flex(num_experts=5, num_experts_per_tok=5, norm_topk_prob=True, num_key_value_heads=1),
    flex(num_experts=7, num_experts_per_tok=4, num_hidden_layers=3, **rope(123.0)),
    flex(num_experts=8, num_experts_per_tok=3, num_attention_heads=2, tie_word_embeddings=True),
    olmo2(),
    olmo2(num_key_value_heads=2, **rope(5e5)),
    olmo2(num_key_value_heads=1, head_dim=10),
    olmo2(tie_word_embeddings=True, hidden_size=12, num_attention_heads=6),
    olmo2(num_hidden_layers=1, intermediate_size=7, **rope(50.0)),
    olmo2(num_hidden_layers=4, rms_norm_eps=1e-2, vocab_size=33),
    olmo2(num_attention_heads=1, head_dim=2, tie_word_embeddings=True),
    olmo2(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=8),
]


@pytest.fixture(scope="module")
def torch_models():
    """The functions of make_golden.py, which imports torch."""
    return runpy.run_path(str(Path(__file__).with_name("make_golden.py")))


@needs_torch
@pytest.mark.parametrize("number", range(len(MODELS)))
def test_logits_are_those_of_transformers(number, torch_models, tmp_path):
    kind, fields = MODELS[number]
    model = torch_models["random_model"](kind, 100 + number, **fields)
    # Every other model in several shards: both forms, with dense, tied, and separate experts.
    model.save_pretrained(tmp_path, max_shard_size="8KB" if number % 2 else "1GB")
    assert (tmp_path / INDEX).exists() == bool(number % 2)
    backbone, experts, config = hf_import.load(tmp_path)

    expected = torch_models["random_batch"](model, number)
    real = expected["attention_mask"] > 0
    found = logits(backbone, experts, expected["tokens"], real.astype(np.int32), config)
    largest = np.abs(expected["logits"][real]).max()
    difference = np.abs(found - expected["logits"])[real].max()
    print(f"{kind}: largest difference / largest logit = {difference / largest:.1e}")
    assert difference <= 1e-5 * largest

    if kind == "flex_olmo":  # in memory, transformers 5 has the experts packed
        packed = {key: value.numpy() for key, value in model.state_dict().items()}
        assert any(key.endswith("gate_up_proj") for key in packed)
        for file in [*tmp_path.glob("*.safetensors"), *tmp_path.glob(INDEX)]:
            file.unlink()
        save_file(packed, tmp_path / WEIGHTS)  # with a tied model's lm_head a second time
        again = hf_import.load(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, again[:2], (backbone, experts))


@needs_torch
@pytest.mark.parametrize(("batch", "end"), [(1, None), (3, None), (3, 1)])
def test_greedy_decoding_is_that_of_transformers(batch, end, torch_models, tmp_path):
    """Token for token, 64 of them or to the end of the text, prompts of different lengths."""
    model = torch_models["random_model"]("flex_olmo", 7, num_experts=4, num_experts_per_tok=2)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in (5, 9, 2)[:batch]]
    found = load(tmp_path).generate(prompts, 64)
    assert any(len(ids) < 64 for ids in found) == (end is not None)
    for prompt, ids in zip(prompts, found, strict=True):
        text = model.dummy_inputs["input_ids"].new_tensor([prompt])
        expected = model.generate(text, max_new_tokens=64, do_sample=False)[0, len(prompt) :]
        assert ids == list(itertools.takewhile(lambda token: token != end, expected.tolist()))


@pytest.fixture
def folder(tmp_path):
    """A FlexOlmo model of 4 experts, 2 layers, width 16, to damage."""
    return shutil.copytree(GOLDEN / "flex_olmo_top2", tmp_path / "model")


def edit_weights(folder, **changes):
    """Sets tensors; None takes one away."""
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


def edit_config(folder, **changes):
    """Sets fields; None takes one away."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {k: v for k, v in fields.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(fields))


def message(folder):
    with pytest.raises(ValueError) as error:
        hf_import.load(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_folders_and_tokenizers_are_recognised(folder, tmp_path):
    assert hf_import.is_hugging_face(folder)
    assert hf_import.is_hugging_face(str(folder))
    assert not hf_import.is_hugging_face(tmp_path)
    assert not hf_import.is_hugging_face(tmp_path / "nowhere")
    assert hf_import.tokenizer_file(folder) is None
    (folder / "tokenizer.json").write_text("{}")
    assert hf_import.tokenizer_file(folder) == folder / "tokenizer.json"


def test_configs_of_both_versions_of_transformers(folder):
    expected = ModelConfig(
        vocab_size=61,
        width=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=20,
        num_experts=4,
        active_experts=2,
        max_length=64,
    )
    assert hf_import.load_config(folder) == expected
    # Version 4, which leaves out what is at its default.
    edit_config(folder, rope_parameters=None, rope_theta=10000, rms_norm_eps=None)
    assert hf_import.load_config(folder) == expected.replace(rope_theta=10_000.0)
    edit_config(folder, rope_theta=None, rope_scaling={"type": "default"}, norm_topk_prob=True)
    assert hf_import.load_config(folder) == expected.replace(renormalize=True)
    edit_config(folder, model_type="olmo2", max_position_embeddings=None, head_dim=6)
    found = hf_import.load_config(folder)
    assert (found.num_experts, found.rope_theta, found.norm_eps) == (1, 1e4, 1e-5)
    assert (found.max_length, found.head_size) == (2048, 6)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("attention_bias", True, "False"),
        ("hidden_act", "gelu", "'silu'"),
        ("sliding_window", 4096, "None"),
        ("layer_types", ["full_attention", "sliding_attention"], "full_attention"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 8.0}, "'default'"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "no more than"),
        ("rope_parameters", "yarn", "an object"),
        ("model_type", "olmoe", "flexmore or olmo2"),
        ("vocab_size", "many", "int"),
        ("num_experts", True, "int"),
        ("hidden_size", None, "int"),
        ("num_key_value_heads", 3, "divide"),
    ],
)
def test_configs_that_cannot_be_expressed_are_refused(folder, field, value, expected):
    edit_config(folder, **{field: value})
    text = message(folder)
    ours = {"num_key_value_heads": "num_kv_heads"}.get(field, field)
    found = "yarn" if "yarn" in str(value) else "full_attention" if field[0] == "r" else str(value)
    assert all(part in text for part in ("config.json", ours, expected, found)), text


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "null"])
def test_a_damaged_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in message(folder)


def test_tensors_that_do_not_fit_are_all_named_at_once(folder):
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    edit_weights(
        folder,
        **{
            "model.norm.weight": None,
            name: np.zeros((16, 20), np.float32),  # transposed
            "model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32),
        },
    )
    text = message(folder)
    assert "1 missing (model.norm.weight [16])" in text
    assert f"1 of another shape ({name}: expected [20, 16], found [16, 20] in {WEIGHTS})" in text
    assert f"1 unknown (model.layers.0.self_attn.q_proj.bias [16] in {WEIGHTS})" in text


def test_a_config_of_another_model_is_refused(folder):
    edit_config(folder, num_experts=6)
    text = message(folder)
    assert "12 missing" in text and "expected [6, 16], found [4, 16]" in text and "..." in text
    edit_config(folder, num_experts=4, num_hidden_layers=1)
    assert "21 unknown" in message(folder)
    edit_config(folder, model_type="olmo2")
    assert "unknown" in message(folder)


def test_a_second_head_is_for_tied_models_only(folder):
    tied = shutil.copytree(GOLDEN / "olmo2_tied", folder.parent / "tied")
    head = {"lm_head.weight": load_file(tied / WEIGHTS)["model.embed_tokens.weight"]}
    edit_weights(tied, **head)
    assert "head" not in named(hf_import.load(tied)[0])
    edit_weights(folder, **{"lm_head.weight": None})
    assert "1 missing (lm_head.weight [61, 16])" in message(folder)


def test_damaged_files_are_named(folder):
    content = (folder / WEIGHTS).read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1], content[:5], b"", b"x" * 100):
        (folder / WEIGHTS).write_bytes(damaged)
        assert WEIGHTS in message(folder)
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in message(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    assert "model-1.safetensors" in message(folder)
    for damaged in ("{", "{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"x": 1}}'):
        (folder / INDEX).write_text(damaged)
        assert INDEX in message(folder)


def test_integers_and_doubled_tensors_are_refused(folder):
    edit_weights(folder, **{"model.norm.weight": np.ones(16, np.int8)})
    text = message(folder)
    assert "model.norm.weight" in text and "BF16" in text and "I8" in text
    (folder / WEIGHTS).unlink()
    save_file({"model.norm.weight": np.ones(16, np.float32)}, folder / "a.safetensors")
    save_file({"model.norm.weight": np.ones(16, np.float32)}, folder / "b.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    assert "model.norm.weight is also in" in message(folder)


def test_dtypes(folder):
    exact = hf_import.load(folder)
    assert {str(x.dtype) for x in jax.tree.leaves(exact[:2])} == {"float32"}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact[:2])
    asked = hf_import.load(folder, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, asked[:2], rounded)

    tensors = {k: v.astype(jnp.bfloat16) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    stored = hf_import.load(folder)
    assert {str(x.dtype) for x in jax.tree.leaves(stored[:2])} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, stored[:2], rounded)

    edit_weights(folder, **{"model.norm.weight": np.ones(16, np.float32)})
    widest = hf_import.load(folder)
    assert {str(x.dtype) for x in jax.tree.leaves(widest[:2])} == {"float32"}


def shard(folder, *, under="model-{}.safetensors"):
    """Cuts the weights into two shards and an index; gives the tensors of each, by file."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys, parts = sorted(tensors), {}
    for number in (0, 1):
        file = under.format(number)
        parts[file] = {key: tensors[key] for key in keys[number::2]}
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(parts[file], folder / file)
    write_index(folder, {key: file for file, part in parts.items() for key in part})
    return parts


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])


@needs_torch
def test_of_several_checkpoints_in_a_folder_the_one_that_transformers_reads(torch_models, tmp_path):
    """Sharded first, then whole: transformers 5 leaves the index of the shards that it removes."""
    from transformers import AutoModelForCausalLM

    old, new = (torch_models["random_model"]("olmo2", seed) for seed in (1, 2))
    old.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    new.save_pretrained(tmp_path)
    assert (tmp_path / INDEX).exists() and (tmp_path / WEIGHTS).exists()

    def expect(model):
        read = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        for key, value in model.state_dict().items():
            np.testing.assert_array_equal(read[key].numpy(), value.numpy())
        backbone, experts, _ = hf_import.load(tmp_path)
        embed = model.state_dict()["model.embed_tokens.weight"].numpy()
        np.testing.assert_array_equal(backbone.embed[...], embed)
        gate = model.state_dict()["model.layers.1.mlp.gate_proj.weight"].numpy()
        np.testing.assert_array_equal(experts.feed_forward.gate[1, 0], gate.T)

    expect(new)
    for file, content in shards.items():  # their files too: what `cp` of both leaves
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="holds two checkpoints; model.safetensors is read"):
        expect(new)
    next(iter(shards)).unlink()  # then it is a leftover
    leftovers = {"consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin"}
    for name in leftovers:
        (tmp_path / name).write_bytes((tmp_path / WEIGHTS).read_bytes()[:50])
    expect(new)
    (tmp_path / WEIGHTS).unlink()
    for file, content in shards.items():
        file.write_bytes(content)
    expect(old)
    # An index that misses a tensor which its shards hold.
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    expect(old)
    for file in shards:
        file.unlink()
    (tmp_path / INDEX).unlink()
    new.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).rename(tmp_path / "mine.safetensors")
    edit_config(tmp_path, transformers_weights="mine.safetensors")
    expect(new)


def test_shards_are_read_where_the_index_has_them(folder):
    """In folders below, and through links, as in the Hugging Face cache; no others."""
    expected = hf_import.load(folder)
    parts = shard(folder, under="below/model-{}.safetensors")
    file = folder / "below" / "model-0.safetensors"
    file.rename(folder.parent / "blob")
    file.symlink_to(folder.parent / "blob")
    save_file({"x": np.ones(3, np.float32)}, folder / "not_named.safetensors")
    same(hf_import.load(folder), expected)
    first = next(iter(parts))
    write_index(
        folder, {key: file for file, part in parts.items() for key in part if file != first}
    )
    assert "missing" in message(folder)  # a shard that the index does not name


@pytest.mark.parametrize(
    "elsewhere", ["../model-0.safetensors", "/model-0.safetensors", "a/../../x"]
)
def test_an_index_that_names_files_elsewhere_is_refused(folder, elsewhere):
    parts = shard(folder)
    (folder / "model-0.safetensors").rename(folder.parent / "model-0.safetensors")
    name = (
        elsewhere.replace("/model", f"{folder.parent}/model", 1)
        if elsewhere[0] == "/"
        else elsewhere
    )
    name = name if name.endswith(".safetensors") else name + ".safetensors"
    files = {"model-0.safetensors": name}
    write_index(folder, {k: files.get(f, f) for f, part in parts.items() for k in part})
    assert "expected files in the folder" in message(folder)


@pytest.mark.parametrize(
    "name",
    ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "model.gguf"],
)
def test_weights_of_another_name_are_refused_by_name(folder, name):
    (folder / WEIGHTS).rename(folder / name)
    assert hf_import.is_hugging_face(folder)
    assert f"expected {WEIGHTS} or {INDEX}, found {name}" in message(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_loading_needs_little_more_than_the_model(packed, tmp_path):
    """Host memory: numpy and bytes are traced, and what JAX holds besides is the model at most."""
    width, hidden, layers, experts, vocab = 256, 512, 4, 4, 4096
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{x}_proj.weight": (width, width) for x in "qkvo"}
        shapes |= {f"{at}.self_attn.{x}_norm.weight": (width,) for x in "qk"}
        shapes[f"{at}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{at}.post_feedforward_layernorm.weight"] = (width,)
        shapes[f"{at}.mlp.gate.weight"] = (experts, width)
        if packed:
            shapes[f"{at}.mlp.experts.gate_up_proj"] = (experts, 2 * hidden, width)
            shapes[f"{at}.mlp.experts.down_proj"] = (experts, width, hidden)
        for e in range(0 if packed else experts):
            shapes[f"{at}.mlp.experts.{e}.gate_proj.weight"] = (hidden, width)
            shapes[f"{at}.mlp.experts.{e}.up_proj.weight"] = (hidden, width)
            shapes[f"{at}.mlp.experts.{e}.down_proj.weight"] = (width, hidden)
    save_file({k: rng.random(s, np.float32) for k, s in shapes.items()}, tmp_path / WEIGHTS)
    fields = {
        "model_type": "flex_olmo",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_experts": experts,
        "num_experts_per_tok": experts,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tracemalloc.start()
    model = hf_import.load(tmp_path)[:2]
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert size > 35e6
    # `kept` is what JAX borrows from numpy instead of copying; the rest of the model is its own.
    assert peak + max(0, size - kept) < 1.5 * size
