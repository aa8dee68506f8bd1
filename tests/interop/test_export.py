"""Exported directories: what is written, for which model, and that nothing of it is lost."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import flexolmo_jax as fo
from flexolmo_jax.config import EVIDENCE
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import read_anchor, write_anchor
from flexolmo_jax.federation.exchange import import_mixture
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.export import export_model
from flexolmo_jax.interop.hf_shards import ToWrite, write_shards
from flexolmo_jax.modeling.experts import Experts, Ranks
from flexolmo_jax.modeling.transformer import Anchor, Backbone
from flexolmo_jax.storage.tensors import named

CONFIG = fo.ModelConfig(
    vocab_size=512, width=32, num_layers=2, num_heads=2, ffn_width=48, max_length=64
)
TOKENS = np.random.default_rng(0).integers(0, 512, (2, 24))
HEADS = {"news": Ranks(6, 4), "code": Ranks(2, 3), "plain": Ranks(0, 5)}


def noisy(tree, seed):
    """Random weights: of zeros too, as biases and halves of heads are at first."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape, np.float32), tree)


def write_packages(folder, tokenizer, ranks, *, bias=-0.5, config=CONFIG):
    """An anchor, and an expert of each name with these ranks of heads."""
    key = jax.random.key(0)
    evidence = max(own.evidence for own in ranks.values())
    public = Experts(config, 1, key, Ranks(0, evidence))
    weights = noisy(Anchor(Backbone(config, key), public), 1)
    weights.public.router.bias[...] = jnp.zeros_like(weights.public.router.bias[...])
    facts = {"licence": "CC-BY-4.0", "contact": "host@a.example"}
    write_anchor(folder / "anchor", weights, config, tokenizer, ["A text."] * 4, facts)
    anchor = read_anchor(folder / "anchor")
    for seed, (name, own) in enumerate(ranks.items(), 2):
        expert = noisy(Experts(config, 1, key, own), seed)
        expert.router.bias[...] = jnp.full_like(expert.router.bias[...], bias)
        facts = {"licence": "CC0-1.0 | <b>", "contact": f"{name}@b.example", "tokens_seen": 12345}
        write_expert(folder / name, expert, name, anchor, facts)
    return folder


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer.load(world.anchor / "tokenizer.json")


@pytest.fixture(scope="module")
def headed(tokenizer, tmp_path_factory):
    """An anchor and experts with heads and biases."""
    return write_packages(tmp_path_factory.mktemp("headed"), tokenizer, HEADS)


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory):
    """An anchor and experts that transformers' FlexOlmo has a place for."""
    folder = tmp_path_factory.mktemp("plain")
    return write_packages(folder, tokenizer, dict.fromkeys(("news", "code"), Ranks()), bias=0.0)


def merged(packages, out, names, **routing):
    routing = {"memory": None, "evidence": None, "allow_share": None} | routing
    fo.merge(packages / "anchor", [packages / name for name in names], out, **routing)
    return out


def stored(folder):
    """All tensors of a directory, read by the library."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    return tensors


def fields(folder, name="config.json"):
    return json.loads((folder / name).read_text())


TORCH = {
    "evidence": (("news", "code", "plain"), {"evidence": EVIDENCE}, []),
    "evidence_top2": (("code", "news"), {"evidence": (0.8, 0.7, 0.5), "active_experts": 2}, []),
    "evidence_without_public": (("code", "news"), {"evidence": EVIDENCE}, ["public"]),
    "memory_and_biases": (("news", "code"), {"memory": (0.8, 0.3), "active_experts": 2}, []),
    "biases": (("plain", "code", "news"), {}, ["news"]),
    "one_with_a_head": (("news", "code"), {"evidence": EVIDENCE}, ["public", "code"]),
}


EXTRA = "needs the extra `reference`"


@pytest.mark.parametrize("case", TORCH)
def test_our_pytorch_file_computes_what_the_plain_classes_cannot(case, headed, tmp_path):
    """Logits of whole texts; greedy tokens, with the cache, in a batch of unlike prompts."""
    torch = pytest.importorskip("torch", reason=EXTRA)
    transformers = pytest.importorskip("transformers", reason=EXTRA)
    names, routing, without = TORCH[case]
    path = merged(headed, tmp_path / "merged", names, **routing)
    written = export_model(path, tmp_path / "hf", without=without)
    assert written.needs_our_file
    model = fo.load(path)
    config = model.config.replace(active_experts=routing.get("active_experts"))
    assert config == model.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True
    )
    expected = np.asarray(model.logits(TOKENS, without=without))
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

    prompts = [TOKENS[0, 1:9].tolist(), TOKENS[1, 1:4].tolist()]
    theirs.generation_config.eos_token_id = None
    new = CONFIG.max_length - max(map(len, prompts))
    ours = [without_end(model, prompt, new, without) for prompt in prompts]
    length = max(map(len, prompts))
    tokens = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        out = theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, **options
        )
        assert out[:, length:].tolist() == ours, options


def without_end(model, prompt, new, without):
    """Greedy tokens, also after an end of text."""
    bare = fo.FlexOlmo(model.backbone, model.experts, model.config, model.expert_names, None)
    (ids,) = bare.generate([prompt], new, without=without)
    assert len(ids) == new
    return ids


def test_the_cache_survives_what_generation_does_to_it(headed, tmp_path):
    """Beams reorder it, speculation crops it; a text may come in pieces, in any cache."""
    torch = pytest.importorskip("torch", reason=EXTRA)
    transformers = pytest.importorskip("transformers", reason=EXTRA)
    path = merged(headed, tmp_path / "merged", ("news", "code"), evidence=EVIDENCE)
    export_model(path, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True
    )
    model.generation_config.eos_token_id = None
    prompt = torch.tensor(TOKENS[:1])
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 30, "do_sample": False}
    plain = model.generate(prompt, **asked, use_cache=False)
    assert torch.equal(model.generate(prompt, **asked, prompt_lookup_num_tokens=3), plain)
    beams = [model.generate(prompt, **asked, num_beams=3, use_cache=x) for x in (True, False)]
    assert torch.equal(*beams)
    with torch.no_grad():
        whole = model(plain).logits
        for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
            pieces = [model(x, past_key_values=cache).logits for x in plain.split([7, 1, 46], 1)]
            assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()
        assert (model(plain, logits_to_keep=2).logits - whole[:, -2:]).abs().max() < 1e-4
        assert model(plain, labels=plain).loss.isfinite()
    with pytest.raises(ValueError, match="routing reads the tokens"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="found position_ids: routing reads all earlier tokens"):
        model(prompt, position_ids=torch.arange(24)[None] % 12)
    with pytest.raises(ValueError, match="found cache, cu_seq_lens_q"):
        model(prompt, cache=None, cu_seq_lens_q=None)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    )
    with torch.no_grad():
        assert torch.equal(again(plain).logits, whole)


@pytest.mark.parametrize("what", ["anchor", "merged", "one"])
def test_plain_models_load_without_any_code(what, plain, tmp_path):
    torch = pytest.importorskip("torch", reason=EXTRA)
    transformers = pytest.importorskip("transformers", reason=EXTRA)
    path, without = plain / "anchor", []
    if what != "anchor":
        path = merged(plain, tmp_path / "merged", ("news", "code"), active_experts=2)
        without = ["public", "code"] if what == "one" else []
    export_model(path, tmp_path / "hf", without=without)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = {"merged": "FlexOlmoForCausalLM"}.get(what, "Olmo2ForCausalLM")
    assert type(theirs).__name__ == expected and not list((tmp_path / "hf").glob("*.py"))
    model = fo.load(path)
    logits = np.asarray(model.logits(TOKENS, without=without))
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()
    prompt = TOKENS[:1, 1:]
    theirs.generation_config.eos_token_id = None
    out = theirs.generate(
        torch.tensor(prompt), attention_mask=torch.ones(1, 23), max_new_tokens=41, do_sample=False
    )
    assert out[0, 23:].tolist() == without_end(model, prompt[0].tolist(), 41, without)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert reader("The theorem").input_ids == model.tokenizer.encode_prompt("The theorem")
    assert reader.eos_token == reader.pad_token == model.tokenizer.separator_text


def test_imported_and_exported_again_the_bits_are_the_same(plain, tmp_path):
    path = merged(plain, tmp_path / "merged", ("news", "code"), active_experts=2)
    export_model(path, tmp_path / "hf", shard_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 5
    names = import_mixture(tmp_path / "hf", tmp_path / "ours")
    experts = [tmp_path / "ours/experts" / name for name in names]
    again = tmp_path / "again"
    fo.merge(
        tmp_path / "ours/anchor", experts, again, memory=None, active_experts=2, allow_share=None
    )
    export_model(again, tmp_path / "hf2", shard_bytes=50_000)
    first, second = stored(tmp_path / "hf"), stored(tmp_path / "hf2")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_text() == (tmp_path / "hf2" / name).read_text()
    one, other = (fo.load(tmp_path / name) for name in ("hf", "hf2"))
    jax.tree.map(np.testing.assert_array_equal, one.experts, other.experts)
    jax.tree.map(np.testing.assert_array_equal, one.backbone, fo.load(path).backbone)


def test_each_kind_is_named_and_says_why(headed, plain, flexolmo, tmp_path):
    def export(*words):
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        code, printed, error = flexolmo("export", *words, "--out", tmp_path / "hf")
        assert code == 0, error
        return " ".join(printed.split())

    merged(headed, tmp_path / "merged", ("news", "code", "plain"), evidence=EVIDENCE)
    said = export(tmp_path / "merged")
    assert "FlexOlmoJaxForCausalLM of public, news, code, plain" in said
    assert "heads of the experts news, code; evidence routing" in said and "trust_remote" in said
    assert fields(tmp_path / "hf")["head_ranks"] == [0, 6, 2, 0]
    assert fields(tmp_path / "hf")["evidence"]["shifts"] == [0.0, 1.5, 1.5, 1.5]
    said = export(tmp_path / "merged", "--without", "public", "news", "plain")
    assert "heads of the experts code" in said and "evidence" not in said  # its weight is 1
    assert fields(tmp_path / "hf")["evidence"] is None
    assert not [name for name in stored(tmp_path / "hf") if "evidence" in name]
    assert "Olmo2ForCausalLM of plain" in export(headed / "plain", "--without", "public")
    assert "Olmo2ForCausalLM of public" in export(headed / "anchor")
    assert "FlexOlmoJaxForCausalLM of public, news" in export(headed / "news")
    assert "FlexOlmoForCausalLM of public, news" in export(plain / "news", "--dtype", "bfloat16")
    assert {str(x.dtype) for x in stored(tmp_path / "hf").values()} == {"bfloat16"}
    assert fields(tmp_path / "hf")["dtype"] == "bfloat16"
    rounded = fo.load(plain / "news", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, fo.load(tmp_path / "hf").backbone, rounded.backbone)


def test_the_card_says_whose_the_weights_are(headed, tmp_path):
    merged(headed, tmp_path / "merged", ("news", "code"), evidence=EVIDENCE)
    export_model(tmp_path / "merged", tmp_path / "hf", without=["code"])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert read_anchor(headed / "anchor").identity in card and "Left out: code." in card
    (row,) = (line for line in card.splitlines() if line.startswith("| news"))
    assert r"CC0-1.0 \| \<b\>" in row and "news@b.example" in row and "12,345" in row
    assert "without differential privacy" in row and "CC-BY-4.0" in card
    assert "code@b.example" not in card


def test_what_cannot_be_exported_is_refused(headed, refused, tmp_path):
    merged(headed, tmp_path / "merged", ("news", "code"), evidence=EVIDENCE)
    words = "export", tmp_path / "merged", "--out", tmp_path / "out"
    assert "no expert named 'nws'; there are public, news" in refused(*words, "--without", "nws")
    everyone = "--without", "public", "news", "code"
    assert "all experts are left out" in refused(*words, *everyone)
    assert "of one with heads of the experts news, code; evidence" in refused(*words, "--no-memory")
    damaged = shutil.copytree(headed, tmp_path / "damaged")
    (file,) = damaged.glob("news/params/state/head.bias/c/0/0/0")
    file.write_bytes(bytes(len(file.read_bytes())))
    assert "head.bias" in refused("export", damaged / "news", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_anchor_is_the_same_anchor(world, tmp_path):
    """Packages made for the one can be merged with the other, and exported again."""
    export_model(world.anchor, tmp_path / "hf")
    assert read_anchor(tmp_path / "hf").identity == read_anchor(world.anchor).identity
    merged = tmp_path / "merged"
    fo.merge(tmp_path / "hf", [world.experts["math"]], merged, memory=None, allow_share=None)
    assert export_model(merged, tmp_path / "again").kind in ("flex_olmo", "flexolmo_jax")
    embed = "model.embed_tokens.weight"
    np.testing.assert_array_equal(stored(tmp_path / "again")[embed], stored(tmp_path / "hf")[embed])


def test_a_router_is_made_plain_at_a_price_that_is_printed(
    world, make_expert, flexolmo, refused, tmp_path
):
    loud = make_expert(tmp_path / "loud", "loud", seed=5, bias=-1.0)
    packages = [world.experts["math"], loud]
    fo.merge(world.anchor, packages, tmp_path / "merged")
    words = "export", tmp_path / "merged", "--fold-biases"
    code, printed, error = flexolmo(*words, "--no-memory", "--out", tmp_path / "hf")
    assert code == 0, error
    said = " ".join(printed.split())
    assert "with its biases folded into its rows and without its memory" in said
    assert "bits per byte before" in said and "largest change of a logit" in said
    assert fields(tmp_path / "hf")["model_type"] == "flex_olmo"
    assert "bits per byte before" in (tmp_path / "hf" / "README.md").read_text()
    ours, folded = fo.load(tmp_path / "merged"), fo.load(tmp_path / "hf")
    assert not np.any(folded.experts.router.bias[...])
    change = folded.experts.router.row[...] - ours.experts.router.row[...]
    assert not np.any(change[:, 0]) and np.all(np.any(change[:, 2], axis=-1))
    out = "--out", tmp_path / "more"
    assert "it also has a router memory: add --no-memory" in refused(*words, *out)
    fo.merge(world.anchor, [world.experts["math"]], tmp_path / "rows", memory=None)
    said = refused("export", tmp_path / "rows", "--no-memory", "--fold-biases", *out)
    assert "it does not have a router memory: leave out --no-memory" in said


def test_tensors_of_any_layout_are_written_as_they_are(tmp_path):
    """A transposed view, and a tensor of two bytes an item before one of four."""
    draw = np.random.default_rng(0)
    tensors = {
        "odd": draw.standard_normal(3).astype(jnp.bfloat16),
        "view": draw.standard_normal((5, 7)).astype(np.float32).T,
        "strided": draw.standard_normal((6, 4)).astype(np.float32)[::2, 1:],
        "large": draw.standard_normal(100).astype(np.float32),
    }
    to_write = [
        ToWrite(key, x.shape, x.dtype, lambda x=x: x)  # type: ignore[misc]
        for key, x in tensors.items()
    ]
    write_shards(tmp_path, to_write, shard_bytes=200)
    found = stored(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    places = fields(tmp_path, "model.safetensors.index.json")["weight_map"]
    assert len(set(places.values())) == 2 and places["large"].startswith("model-00002-of-00002")
    with safe_open(tmp_path / places["odd"], framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


MEASURED = """
import re, sys
from pathlib import Path
from flexolmo_jax.federation.export import export_model

def memory(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", status)[1])

small, large, out = map(Path, sys.argv[1:4])
export_model(small, out / "small.hf")  # imports what it needs
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
export_model(large, out / "large.hf", shard_bytes=int(sys.argv[4]))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_less_than_a_shard_and_two_layers_of_an_expert(tokenizer, tmp_path):
    config = CONFIG.replace(width=512, ffn_width=2048, num_layers=3)
    ranks = dict.fromkeys(("one", "two"), Ranks(8))
    for name, sizes in (("large", config), ("small", CONFIG)):
        write_packages(tmp_path / name, tokenizer, ranks, config=sizes)
        merged(tmp_path / name, tmp_path / name / "merged", list(ranks))
    shard, layer = 20_000_000, 3 * 4 * config.width * config.ffn_width
    folders = tmp_path / "small/merged", tmp_path / "large/merged", tmp_path, str(shard)
    ran = subprocess.run([sys.executable, "-c", MEASURED, *folders], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    total = sum(x.nbytes for x in named(fo.load(folders[1]).experts).values())
    print(f"{int(ran.stdout) / 1e6:.1f} MB of {total / 1e6:.0f} MB")
    assert int(ran.stdout) < shard + 2 * layer < total / 2
