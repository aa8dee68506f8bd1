"""The layouts of Ai2's released models: their tensors at full size, and small ones, imported."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import flexolmo_jax as fo
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.interop import hf_import
from flexolmo_jax.interop.layouts import BACKBONE, experts_table, sizes_of

TOKENS = np.arange(40).reshape(2, 20)
SMALL = {"vocab_size": 520, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
FULL = {"vocab_size": 100_352, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
MIXTURE = {
    "model_type": "flex_olmo", "architectures": ["FlexOlmoForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": 0, "hidden_act": "silu",
    "max_position_embeddings": 4096, "norm_topk_prob": False, "output_router_logits": False,
    "pad_token_id": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500_000,
    "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "float32",
    "use_cache": True,
}  # fmt: skip
DENSE = {key: x for key, x in MIXTURE.items() if "router" not in key and key != "norm_topk_prob"}
DENSE |= {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
V5 = {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
# (fields, experts, packed as transformers 5 holds them in memory, dtype)
RELEASED = {
    "FlexOlmo-7x7B-1T": ({**MIXTURE, "num_experts": 7, "num_experts_per_tok": 7}, 7, False, "f4"),
    "FlexOlmo-7x7B-1T-RT": (
        {**MIXTURE, "num_experts": 7, "num_experts_per_tok": 7}, 7, False, "f4"
    ),
    "Flex-reddit-2x7B-1T": (
        {**MIXTURE, "num_experts": 2, "num_experts_per_tok": 2}, 2, False, "f4"
    ),
    "Flex-public-7B-1T": (DENSE, 0, False, "f4"),
    "BAR-5x7B": ({**MIXTURE, **V5, "num_experts": 5, "num_experts_per_tok": 5}, 5, False, "bf16"),
    "BAR-5x7B, packed": (
        {**MIXTURE, **V5, "num_experts": 5, "num_experts_per_tok": 5}, 5, True, "bf16"
    ),
}  # fmt: skip
# Parameters by the index files' own metadata; of BAR, by the Hub. Its vocabulary is not padded.
SIZES = {"FlexOlmo-7x7B-1T": 33_270_665_216, "FlexOlmo-7x7B-1T-RT": 33_270_665_216,
         "BAR-5x7B": 24_612_753_408, "BAR-5x7B, packed": 24_612_753_408}  # fmt: skip


def released_shapes(sizes, experts, packed):
    """{name: shape} of a release, written out, not taken from the tables that read it."""
    vocab, width, hidden = (sizes[x] for x in ("vocab_size", "hidden_size", "intermediate_size"))
    shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes["model.norm.weight"] = (width,)
    matrices = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    for layer in range(sizes["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{x}_proj.weight": (width, width) for x in "qkvo"}
        shapes |= {f"{at}.self_attn.{x}_norm.weight": (width,) for x in "qk"}
        shapes[f"{at}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{at}.post_feedforward_layernorm.weight"] = (width,)
        if not experts:
            shapes |= {f"{at}.mlp.{x}_proj.weight": shape for x, shape in matrices.items()}
            continue
        shapes[f"{at}.mlp.gate.weight"] = (experts, width)
        if packed:
            shapes[f"{at}.mlp.experts.gate_up_proj"] = (experts, 2 * hidden, width)
            shapes[f"{at}.mlp.experts.down_proj"] = (experts, width, hidden)
            continue
        for expert in range(experts):
            for x, shape in matrices.items():
                shapes[f"{at}.mlp.experts.{expert}.{x}_proj.weight"] = shape
    return shapes


def write_release(folder, name, tokenizer=None):
    """A generated checkpoint in three shards with an index."""
    fields, experts, packed, kind = RELEASED[name]
    draw = np.random.default_rng(0)
    dtype = {"f4": np.float32, "bf16": jnp.bfloat16}[kind]
    shapes = released_shapes(SMALL, experts, packed)
    tensors = {
        key: ((len(shape) == 1) + 0.1 * draw.standard_normal(shape)).astype(dtype)
        for key, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    places = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**fields, **SMALL}))
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.json")
    return tensors


@pytest.mark.parametrize("name", RELEASED)
def test_at_full_size_the_tables_expect_the_tensors_of_the_release(name):
    fields, experts, packed, _ = RELEASED[name]
    sizes = {**FULL, "vocab_size": 100_278} if "BAR" in name else FULL
    shapes = released_shapes(sizes, experts, packed)
    if name in SIZES:
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == SIZES[name]
    config = ModelConfig(
        vocab_size=sizes["vocab_size"], width=4096, num_layers=32, num_heads=32, ffn_width=11_008,
        num_experts=experts or 1,
    )  # fmt: skip
    expected = {
        key: source.shape(sizes_of(config))
        for source in {**BACKBONE, **experts_table(config, shapes)}.values()
        for _, key in source.places(config)
    }
    assert expected == shapes


@pytest.mark.parametrize("name", RELEASED)
def test_a_small_one_is_read_and_imported(name, world, flexolmo, tmp_path):
    tensors = write_release(tmp_path / "hf", name, world.anchor / "tokenizer.json")
    fields, experts, _, kind = RELEASED[name]
    config = hf_import.load_config(tmp_path / "hf")
    assert (config.num_experts, config.rope_theta) == (experts or 1, 5e5)
    model = fo.load(tmp_path / "hf")
    assert str(model.backbone.embed.dtype) == {"f4": "float32", "bf16": "bfloat16"}[kind]
    np.testing.assert_array_equal(model.backbone.embed[...], tensors["model.embed_tokens.weight"])
    code, _, error = flexolmo("import", tmp_path / "hf", "--out", tmp_path / "ours")
    if not experts:
        assert code == 2 and "it can be used as an anchor as it is" in error
        return
    assert code == 0, error
    packages = [tmp_path / f"ours/experts/expert_{e}" for e in range(1, experts)]
    fo.merge(
        tmp_path / "ours/anchor", packages, tmp_path / "merged", memory=None,
        active_experts=fields["num_experts_per_tok"], allow_share=None,
    )  # fmt: skip
    merged = fo.load(tmp_path / "merged")
    np.testing.assert_array_equal(merged.logits(TOKENS), model.logits(TOKENS))


def test_directories_that_share_an_anchor_become_packages_for_it(
    world, flexolmo, refused, tmp_path
):
    """As Flex-news-2x7B and Flex-math-2x7B: one anchor, each with an expert of its own."""
    name, file = "Flex-reddit-2x7B-1T", "model.safetensors"
    tensors = write_release(tmp_path / "news", name, world.anchor / "tokenizer.json")
    other = {key: x + np.float32(0.01) * (".experts.1." in key) for key, x in tensors.items()}
    shutil.copytree(tmp_path / "news", tmp_path / "math")
    for shard in (tmp_path / "math").glob("model*"):
        shard.unlink()
    save_file(other, tmp_path / "math" / file)
    code, _, error = flexolmo(
        "import", tmp_path / "news", "--out", tmp_path / "ours", "--names", "news"
    )
    assert code == 0, error
    words = "import", tmp_path / "math", "--anchor", tmp_path / "ours/anchor", "--names", "math"
    code, printed, error = flexolmo(*words, "--out", tmp_path / "theirs")
    assert code == 0, error
    assert sorted(x.name for x in (tmp_path / "theirs").iterdir()) == ["experts"]
    packages = [tmp_path / "ours/experts/news", tmp_path / "theirs/experts/math"]
    fo.merge(tmp_path / "ours/anchor", packages, tmp_path / "merged", memory=None, allow_share=None)
    model = fo.load(tmp_path / "merged")
    alone = fo.load(tmp_path / "math")
    np.testing.assert_array_equal(model.logits(TOKENS, without=["news"]), alone.logits(TOKENS))

    # BAR's: embeddings and head are trained with the expert, in reinforcement learning attention.
    for key, change in (("lm_head.weight", 0.5), ("model.layers.1.self_attn.q_proj.weight", 1e-6),
                        ("model.layers.0.mlp.experts.0.up_proj.weight", 0.25),
                        ("model.layers.1.mlp.gate.weight", 0.125)):  # fmt: skip
        save_file({**other, key: other[key] + np.float32(change)}, tmp_path / "math" / file)
        said = refused(*words, "--out", tmp_path / "again")
        assert "1 of the tensors that experts share with their anchor are not those of" in said
        assert f"{key} (largest difference" in said and not (tmp_path / "again").exists()
    save_file({key: x.astype(np.float16) for key, x in other.items()}, tmp_path / "math" / file)
    said = refused(*words, "--out", tmp_path / "again")
    assert "model.embed_tokens.weight (float16, and there float32)" in said and "; ..." in said
    said = refused(*words, "more", "--out", tmp_path / "again")
    assert "expected 1 names" in said
