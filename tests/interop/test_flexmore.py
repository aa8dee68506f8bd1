"""FlexMoRE directories: read, imported as packages, written, and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flexolmo_jax as fo
from flexolmo_jax.evaluation import folding
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.compress import compress
from flexolmo_jax.federation.export import PlainRouting, export_model
from flexolmo_jax.interop import hf_import

WIDTH, HIDDEN, LAYERS, VOCAB = 16, 24, 2, 512
TOKENS = np.arange(40).reshape(2, 20)
RANKS = [0, 3, 0, 5, 3]


def write_flexmore(folder, ranks, tokenizer=None, **changes):
    """A directory with the keys that FlexMoRE's `save_pretrained` writes, and random weights."""
    draw = np.random.default_rng(0)
    tensors = {}

    def add(name, *shape):
        scale = 0.1 if len(shape) > 1 else 0.05
        tensors[name] = (len(shape) == 1) + scale * draw.standard_normal(shape).astype(np.float32)

    add("model.embed_tokens.weight", VOCAB, WIDTH)
    add("lm_head.weight", VOCAB, WIDTH)
    add("model.norm.weight", WIDTH)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            add(f"{at}self_attn.{name}_proj.weight", WIDTH, WIDTH)
        for name in ("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm",
                     "post_feedforward_layernorm"):  # fmt: skip
            add(f"{at}{name}.weight", WIDTH)
        add(f"{at}mlp.gate.weight", len(ranks), WIDTH)
        for expert, rank in enumerate(ranks):
            for name, (out, given) in {
                "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN),
            }.items():  # fmt: skip
                key = f"{at}mlp.experts.{expert}.{name}_proj"
                if rank:
                    add(f"{key}_a.weight", rank, given)
                    add(f"{key}_b.weight", out, rank)
                else:
                    add(f"{key}.weight", out, given)
    config = {
        "model_type": "flexmore", "architectures": ["FlexMoREForCausalLM"],
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_experts": len(ranks),
        "num_experts_per_tok": 3, "expert_ranks": ranks, "tie_word_embeddings": False, **changes,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return tensors


def write_in_full(folder, tensors, ranks):
    """The FlexOlmo directory of the full experts that the deltas stand for."""
    config = json.loads((folder / "config.json").read_text())
    full = {name: x for name, x in tensors.items() if "_proj_" not in name}
    for layer in range(LAYERS):
        for expert, rank in enumerate(ranks):
            for name in ("gate", "up", "down") if rank else ():
                at = f"model.layers.{layer}.mlp.experts."
                a, b = (tensors[f"{at}{expert}.{name}_proj_{x}.weight"] for x in "ab")
                full[f"{at}{expert}.{name}_proj.weight"] = (
                    tensors[f"{at}0.{name}_proj.weight"] + b @ a
                )
    out = folder.with_name("full")
    out.mkdir()
    save_file(full, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({**config, "model_type": "flex_olmo"}))
    return out


def test_a_directory_computes_what_its_full_experts_would(tmp_path):
    tensors = write_flexmore(tmp_path / "model", RANKS)
    model = fo.load(tmp_path / "model")
    assert model.expert_names == ("public", "expert_2", "expert_1", "expert_4", "expert_3")
    ranks = [group.gate.a.shape[-1] for group in model.experts.feed_forward.low_rank.groups]
    assert ranks == [3, 5] and model.config.active_experts == 3
    full = fo.load(write_in_full(tmp_path / "model", tensors, RANKS))
    for without in ([], ["expert_1"], ["expert_2", "expert_3"]):
        np.testing.assert_allclose(
            model.logits(TOKENS, without=without), full.logits(TOKENS, without=without), atol=1e-5
        )
    assert model.generate([[1, 2, 3]], 4) == full.generate([[1, 2, 3]], 4)
    mesh = fo.make_mesh(devices=jax.devices()[:1])
    spread = fo.load(tmp_path / "model", mesh=mesh)
    np.testing.assert_allclose(spread.logits(TOKENS), model.logits(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    "ranks", [None, [0, 3], [3, 0, 0, 0, 0], [0, 3, 0, 5, True], [0, 3, 0, 5, -1], "0, 3"]
)
def test_ranks_that_cannot_be_are_refused(tmp_path, ranks):
    write_flexmore(tmp_path / "model", RANKS, expert_ranks=ranks)
    with pytest.raises(ValueError, match=r"config.json: expert_ranks: expected 5 ranks"):
        fo.load(tmp_path / "model")


def test_factors_of_another_rank_are_named(tmp_path):
    write_flexmore(tmp_path / "model", RANKS, expert_ranks=[0, 3, 0, 5, 4])
    with pytest.raises(ValueError, match=r"experts.4.down_proj_a.weight: expected \[4, 24\], fou"):
        hf_import.load(tmp_path / "model")


def test_it_is_imported_as_an_anchor_and_packages(world, flexolmo, tmp_path):
    write_flexmore(tmp_path / "model", RANKS, world.anchor / "tokenizer.json")
    code, printed, error = flexolmo("import", tmp_path / "model", "--out", tmp_path / "ours")
    assert code == 0, error
    anchor, experts = tmp_path / "ours" / "anchor", tmp_path / "ours" / "experts"
    order = [f"expert_{e}" for e in (2, 1, 4, 3)]
    assert sorted(path.name for path in experts.iterdir()) == sorted(order)
    packages = [experts / name for name in order]
    assert [fo.load(p).experts.router.row.shape[1] for p in packages] == [2] * 4
    fo.merge(anchor, packages, tmp_path / "merged", memory=None, active_experts=3)
    model = fo.load(tmp_path / "model")
    merged = fo.load(tmp_path / "merged")
    assert merged.expert_names == model.expert_names
    np.testing.assert_array_equal(merged.logits(TOKENS), model.logits(TOKENS))


def test_what_is_written_is_read_back(world, make_expert, flexolmo, tmp_path):
    full = world.experts["math"]
    small = make_expert(tmp_path / "small.full", "small", seed=1, bias=0.0)
    compress(small, tmp_path / "small", energy=0.5, anchor=world.anchor)
    packages = [full, tmp_path / "small"]
    fo.merge(world.anchor, packages, tmp_path / "merged", memory=None, active_experts=2)
    words = "export", tmp_path / "merged", "--out", tmp_path / "written"
    code, printed, error = flexolmo(*words, "--fold-biases")
    assert code == 0, error
    assert "FlexMoREForCausalLM of public, math, small, 1 of them low-rank" in printed.replace(
        "\n", " "
    )
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    rank = config["expert_ranks"][2]
    assert config["model_type"] == "flexmore" and config["expert_ranks"] == [0, 0, rank] and rank
    stored = {}
    for file in (tmp_path / "written").glob("*.safetensors"):
        stored |= load_file(file)
    assert stored["model.layers.1.mlp.experts.2.down_proj_a.weight"].shape == (rank, 48)
    assert stored["model.layers.1.mlp.experts.2.down_proj_b.weight"].shape == (32, rank)
    assert "model.layers.0.mlp.experts.1.gate_proj.weight" in stored
    merged, written = fo.load(tmp_path / "merged"), fo.load(tmp_path / "written")
    folded = folding.fold_biases(merged, read_anchor(world.anchor))
    np.testing.assert_allclose(written.logits(TOKENS), folded.logits(TOKENS), atol=1e-5)
    assert written.tokenizer.digest == merged.tokenizer.digest

    # Without the public expert, which the deltas are added to, the low-rank one is a full one.
    code, printed, error = flexolmo(*words[:2], "--without", "public", "--out", tmp_path / "full")
    assert code == 0 and "FlexOlmoJaxForCausalLM of math, small" in printed, error
    export_model(
        tmp_path / "merged", tmp_path / "two", without=["public"],
        routing=PlainRouting(np.asarray(folded.experts.router.row[...]), True, ""),
    )  # fmt: skip
    np.testing.assert_allclose(
        fo.load(tmp_path / "two").logits(TOKENS), folded.logits(TOKENS, without=["public"]),
        atol=1e-5,
    )  # fmt: skip


def test_what_is_no_mixture_is_not_imported(world, refused, tmp_path):
    out = tmp_path / "out"
    assert "expected a Hugging Face directory" in refused("import", world.anchor, "--out", out)
    assert not out.exists()
