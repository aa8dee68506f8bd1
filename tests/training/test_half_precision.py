"""Anchors that are stored in half precision: all that is trained beside them is float32."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.loading import load_model
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.interop import hf_import
from flexolmo_jax.interop.layouts import BACKBONE, DENSE, sizes_of
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.storage.tensors import named
from flexolmo_jax.training import loop
from flexolmo_jax.training.stages.anchor import train_anchor
from flexolmo_jax.training.stages.expert import train_expert
from flexolmo_jax.training.stages.joint import train_jointly
from flexolmo_jax.training.stages.router import train_router

RATE = 1e-5  # bfloat16 holds 8 bits: a step of so little moves nearly no weight of it
FIELDS = {
    "model_type": "olmo2", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory):
    """Hugging Face folders: bfloat16 and float16, and the numbers of each in float32."""
    root, draw = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    found = {}
    for dtype in ("bfloat16", "float16"):
        for stored in (dtype, "float32"):
            folder = root / f"{dtype}_in_{stored}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(FIELDS))
            shutil.copy(world.anchor / "tokenizer.json", folder)
            if stored == dtype:
                config = hf_import.load_config(folder)
                table, sizes = {**BACKBONE, **DENSE}, sizes_of(config)
                numbers = {
                    key: np.ones(source.shape(sizes))
                    if "norm" in key
                    else draw.normal(0, 0.06, source.shape(sizes))
                    for source in table.values()
                    for _, key in source.places(config)
                }
            rounded = {key: jnp.asarray(x, dtype).astype(stored) for key, x in numbers.items()}
            save_file(rounded, folder / "model.safetensors")
            found[dtype, stored] = folder
    return found


def at_a_low_rate(config):
    slow = dataclasses.replace(config.optimizer, learning_rate=RATE, warmup_steps=0)
    return dataclasses.replace(config, optimizer=slow)


def trained(world, folder, anchor, stage, **more):
    """The package of an expert that was trained beside `anchor`, in `folder`."""
    public = str(world.texts["public"]) if stage == "alone" else None
    train_expert(
        at_a_low_rate(world.config(stage)), anchor=anchor, data=str(world.texts["math"]),
        name="math", out=folder / "out", run=folder / "run", public=public, **more,
    )  # fmt: skip
    return folder / "out"


def losses(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def expert_of(package, anchor) -> Experts:
    loaded = load_model(package, anchor)
    return jax.tree.map(lambda x: np.asarray(x[:, 1:]), loaded.experts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", ["alone", "pair"])
def test_an_expert_learns_as_beside_the_same_anchor_in_float32(
    world, folders, tmp_path, dtype, stage
):
    half, full = folders[dtype, dtype], folders[dtype, "float32"]
    packages = [
        trained(world, tmp_path / name, anchor, stage)
        for name, anchor in (("half", half), ("full", full))
    ]
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "full"), rel=1e-6)
    ours, theirs = (
        expert_of(path, anchor) for path, anchor in zip(packages, (half, full), strict=True)
    )
    start = read_anchor(half).weights.public
    for name, leaf in named(ours.feed_forward).items():
        before = np.asarray(named(start.feed_forward)[name], np.float32)
        assert leaf.dtype == np.float32
        assert np.mean(leaf != before) > 0.99, f"{name}: nearly all weights move"
        np.testing.assert_allclose(leaf, named(theirs.feed_forward)[name], atol=1e-6)


def test_beside_half_precision_a_stopped_run_resumes_bit_for_bit(
    world, folders, tmp_path, monkeypatch
):
    anchor = folders["bfloat16", "bfloat16"]
    straight = trained(world, tmp_path / "straight", anchor, "alone")
    real = loop.batches

    def stopped(source, seed, start=0):
        for number, batch in enumerate(real(source, seed, start), start + 1):
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", stopped)
        with pytest.raises(loop.Interrupted):
            trained(world, tmp_path / "stopped", anchor, "alone")
    again = trained(world, tmp_path / "stopped", anchor, "alone", resume=True)
    jax.tree.map(
        np.testing.assert_array_equal, expert_of(straight, anchor), expert_of(again, anchor)
    )


def test_a_merged_model_holds_the_experts_as_they_were_trained(world, folders, tmp_path):
    """Float32 experts beside a public one in bfloat16; and its router can be tuned."""
    anchor = folders["bfloat16", "bfloat16"]
    package = trained(world, tmp_path, anchor, "pair")
    merge(anchor, [package], tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    pair = load_model(package, anchor)
    jax.tree.map(np.testing.assert_array_equal, merged.experts, pair.experts)
    assert merged.backbone.head.dtype == jnp.bfloat16  # frozen: as it is stored

    tuning = at_a_low_rate(world.config("router"))
    where = {"out": tmp_path / "tuned", "run": tmp_path / "tuned.run"}
    train_router(tuning, model=tmp_path / "merged", data=str(world.texts["math"]), **where)
    rows = load_model(tmp_path / "tuned").experts.router.row[...]
    assert rows.dtype == jnp.float32
    assert np.mean(np.asarray(rows) != np.asarray(pair.experts.router.row[...])) > 0.99


def test_whole_models_that_start_from_float16_are_trained_in_float32(world, folders, tmp_path):
    anchor = folders["float16", "float16"]
    model = hf_import.load_config(anchor)
    config = at_a_low_rate(
        world.config("anchor", steps=2, model=model, tokenizer=str(anchor / "tokenizer.json"))
    )
    where = {"data": str(world.texts["math"]), "run": tmp_path / "run", "out": tmp_path / "out"}
    train_anchor(config, start=anchor, **where)
    mixture = dataclasses.replace(config, model=model.replace(num_experts=2))
    together = {**where, "run": tmp_path / "joint.run", "out": tmp_path / "joint"}
    train_jointly(mixture, anchor=anchor, **together)
    for folder in (tmp_path / "out", tmp_path / "joint" / "anchor"):
        ends, start = named(read_anchor(folder).weights), named(read_anchor(anchor).weights)
        for name in ("backbone.head", "public.feed_forward.up"):
            assert ends[name].dtype == jnp.float32
            assert np.mean(np.asarray(ends[name]) != np.asarray(start[name], np.float32)) > 0.99
