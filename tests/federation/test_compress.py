"""Compressed packages: as near as their rank allows, and in every command what a full one is."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

import flexolmo_jax as fo
from flexolmo_jax.evaluation.bits_per_byte import bits_per_byte
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.compress import compress
from flexolmo_jax.federation.expert import read_expert
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.modeling.experts import join
from flexolmo_jax.storage.tensors import named

TOKENS = np.arange(60).reshape(3, 20)


@pytest.fixture(scope="module")
def packages(world, make_expert, tmp_path_factory):
    """By name: a full package, and low-rank ones of other ranks."""
    folder = tmp_path_factory.mktemp("compressed")
    found = {"math": world.experts["math"]}
    for seed, (name, size) in enumerate({"five": {"rank": 5}, "most": {"energy": 0.8}}.items()):
        full = make_expert(folder / f"{name}.full", name, seed=seed)
        compress(full, folder / name, anchor=world.anchor, **size)
        found[name] = folder / name
    return found


def merged_logits(world, packages, names, folder, **choice):
    fo.merge(world.anchor, [packages[name] for name in names], folder, allow_share=None)
    return fo.load(folder).logits(TOKENS, **choice)


def test_at_full_rank_it_is_the_same_expert(world, tmp_path):
    full = world.experts["math"]
    done = compress(full, tmp_path / "math", rank=32)
    assert done.ranks == {name: [32, 32] for name in ("gate", "up", "down")}
    assert all(share == pytest.approx(1) for shares in done.energy.values() for share in shares)
    anchor = read_anchor(world.anchor)
    expected, found = (named(read_expert(path, anchor)) for path in (full, tmp_path / "math"))
    assert expected.keys() == found.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-6, err_msg=name)
    before, after = (read_manifest(path) for path in (full, tmp_path / "math"))
    for key in before.keys() - {"made_by", "tensors", "files", "digest"}:
        assert after[key] == before[key], key
    assert after["compressed"] == {"from": before["digest"], "rank": 32}


def test_each_matrix_is_the_nearest_of_its_rank(world, make_expert, tmp_path):
    full = make_expert(tmp_path / "full", "noise", seed=3)
    anchor = read_anchor(world.anchor)
    done = compress(full, tmp_path / "out", energy=0.6, anchor=world.anchor)
    expected, found, public = (
        named(x.feed_forward)
        for x in (read_expert(full, anchor), read_expert(tmp_path / "out", anchor),
                  anchor.weights.public)
    )  # fmt: skip
    tensors = read_manifest(tmp_path / "out")["tensors"]
    for name, ranks in done.ranks.items():
        assert tensors[f"feed_forward.{name}.a"]["shape"][-1] == max(ranks)
        for layer, rank in enumerate(ranks):
            delta = np.asarray(expected[name] - public[name], np.float64)[layer, 0]
            values = np.linalg.svd(delta, compute_uv=False) ** 2
            share = values[:rank].sum() / values.sum()
            assert share >= 0.6 > values[: rank - 1].sum() / values.sum()
            assert done.energy[name][layer] == pytest.approx(share)
            left = np.asarray(expected[name] - found[name], np.float64)[layer, 0]
            assert np.sum(left**2) == pytest.approx(values[rank:].sum(), rel=1e-3)
    assert done.bytes_after < done.bytes_before


def test_one_that_is_switched_off_was_never_merged_bit_for_bit(world, packages, tmp_path):
    names = list(packages)
    for number, kept in enumerate(itertools.combinations(names, 2)):
        (off,) = set(names) - set(kept)
        found = merged_logits(world, packages, names, tmp_path / f"all{number}", without=[off])
        never = merged_logits(world, packages, kept, tmp_path / f"kept{number}")
        np.testing.assert_array_equal(found, never)
    alone = fo.load(tmp_path / "all0").logits(TOKENS, without=names)
    np.testing.assert_array_equal(alone, fo.load(world.anchor).logits(TOKENS))


def test_it_is_loaded_scored_and_generated_with_like_a_full_one(world, packages, tmp_path):
    fo.merge(world.anchor, packages.values(), tmp_path / "merged", allow_share=None)
    model = fo.load(tmp_path / "merged")
    assert model.expert_names == ("public", "math", "five", "most")
    text = str(world.texts["math"])
    assert bits_per_byte(model, text, heldout=0.1).bits_per_byte > 0
    prompt = TOKENS[0].tolist()
    for dtype in (None, "int8"):
        chosen = fo.load(tmp_path / "merged", dtype=dtype)
        for without in ([], ["five"], ["five", "most"]):
            (generated,) = chosen.generate([prompt], 4, without=without)
            for length in range(len(generated)):
                logits = chosen.logits([prompt + generated[:length]], without=without)
                assert int(np.argmax(logits[0, -1])) == generated[length]
    fo.remove_expert(tmp_path / "merged", "five")
    fo.add_expert(tmp_path / "merged", packages["five"], allow_share=None)
    assert fo.load(tmp_path / "merged").expert_names == ("public", "math", "five", "most")
    alone = fo.load(packages["five"], anchor=world.anchor)
    assert alone.logits(TOKENS, only=["five"]).shape == (3, 20, 512)
    half = fo.load(tmp_path / "merged", dtype="bfloat16")
    assert half.experts.feed_forward.low_rank.groups[0].up.a.dtype == "bfloat16"


def test_in_memory_it_is_low_rank_and_computes_what_full_experts_would(world, packages, tmp_path):
    names = list(packages)
    found = merged_logits(world, packages, names, tmp_path / "merged")
    model = fo.load(tmp_path / "merged")
    own = model.experts.feed_forward
    assert own.full.gate.shape[1] == 2
    assert [group.gate.a.shape[1] for group in own.low_rank.groups] == [1, 1]
    anchor = read_anchor(world.anchor)
    public, *full = [anchor.weights.public, *(read_expert(packages[n], anchor) for n in names)]
    obvious = dataclasses.replace(model, experts=join(public, *full))
    np.testing.assert_allclose(found, obvious.logits(TOKENS), atol=1e-4)
    mesh = fo.make_mesh(devices=jax.devices()[:1])
    sharded = fo.load(tmp_path / "merged", mesh=mesh)
    assert named(sharded.experts).keys() == named(model.experts).keys()
    np.testing.assert_allclose(sharded.logits(TOKENS), obvious.logits(TOKENS), atol=1e-4)


def test_low_rank_experts_come_after_full_ones_by_rank(world, packages, tmp_path):
    names = ["most", "five", "math"]
    fo.merge(world.anchor, [packages[n] for n in names], tmp_path / "merged", allow_share=None)
    assert fo.load(tmp_path / "merged").expert_names == ("public", "math", "five", "most")
    other = merged_logits(world, packages, ["math", "five", "most"], tmp_path / "other")
    np.testing.assert_array_equal(fo.load(tmp_path / "merged").logits(TOKENS), other)


def test_a_compressed_package_can_be_compressed_again(world, packages, tmp_path):
    compress(packages["five"], tmp_path / "two", rank=2, anchor=world.anchor)
    full = packages["five"].with_name("five.full")
    compress(full, tmp_path / "at_once", rank=2, anchor=world.anchor)
    anchor = read_anchor(world.anchor)
    twice, once = (named(read_expert(tmp_path / n, anchor)) for n in ("two", "at_once"))
    for name, leaf in once.items():
        np.testing.assert_allclose(twice[name], leaf, atol=1e-5, err_msg=name)


def test_the_command_says_what_it_kept_and_inspect_shows_it(world, flexolmo, tmp_path):
    out = tmp_path / "small"
    words = ("compress", world.experts["math"], "--out", out, "--energy", "0.9")
    code, printed, error = flexolmo(*words, "--anchor", world.anchor)
    assert code == 0, error
    assert "energy kept" in printed + error and "MB of weights" in printed + error
    code, printed, _ = flexolmo("inspect", out)
    assert code == 0 and "feed_forward.gate.a" in printed and "energy 0.9" in printed
    code, printed, _ = flexolmo("inspect", out, "--json")
    assert json.loads(printed)["compressed"]["energy"] == 0.9


def test_what_cannot_be_compressed_is_said_in_one_line(world, refused, tmp_path):
    out, math = tmp_path / "out", world.experts["math"]

    def said(*words, package=math, where=out):
        return refused("compress", package, "--out", where, *words)

    assert "give a rank, an energy, or bits" in said()
    assert "not allowed with" in said("--rank", "4", "--energy", "0.9")
    assert "rank must be from 1 to 32" in said("--rank", "33")
    assert "found 0" in said("--rank", "0")
    for energy in ("0", "1.5", "nan"):
        assert "energy must be in (0, 1]" in said("--energy", energy)
    assert "expected a package of kind expert, found anchor" in said(
        "--rank", "4", package=world.anchor
    )
    assert "already there" in said("--rank", "4", where=math)
    assert "no such folder" in said("--rank", "4", package=tmp_path / "nothing")
    assert "expected a package of kind anchor" in said("--rank", "4", "--anchor", math)
    assert not out.exists()


def test_a_changed_factor_is_found(world, packages, refused, tmp_path):
    copy = tmp_path / "five"
    shutil.copytree(packages["five"], copy)
    file = next((copy / "params").rglob("feed_forward.down.b")) / "c/0/0/0/0"
    content = bytearray(file.read_bytes())
    content[40] ^= 4
    file.write_bytes(bytes(content))
    assert "(tensor feed_forward.down.b): changed after" in refused("inspect", copy)
    shutil.rmtree(file.parents[4])
    assert "feed_forward.down.b" in refused("inspect", copy)


def test_an_expert_can_be_trained_low_rank_from_the_start(world, packages, flexolmo, tmp_path):
    fits, out = world.config("alone"), tmp_path / "small"
    code, _, error = flexolmo(
        *world.expert_words(out, "--rank", "3", "--head-rank", "2", name="small")
    )
    assert code == 0, error
    tensors = read_manifest(out)["tensors"]
    width, hidden = 32, 48
    for name, (rows, columns) in {
        "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width),
    }.items():  # fmt: skip
        assert tensors[f"feed_forward.{name}.a"]["shape"] == [2, 1, rows, 3]
        assert tensors[f"feed_forward.{name}.b"]["shape"] == [2, 1, 3, columns]
    anchor = read_anchor(world.anchor)
    trained, public = (
        named(x.feed_forward) for x in (read_expert(out, anchor), anchor.weights.public)
    )
    for name, leaf in trained.items():
        assert np.linalg.matrix_rank(np.asarray(leaf - public[name])[0, 0], tol=1e-5) == 3
    losses = [json.loads(line)["loss"] for line in (tmp_path / "small.run/metrics.jsonl").open()]
    assert len(losses) == fits.steps and losses[-1] < losses[0]
    names = {**packages, "small": out}
    found = merged_logits(world, names, ["small", "math"], tmp_path / "both", without=["small"])
    never = merged_logits(world, names, ["math"], tmp_path / "one")
    np.testing.assert_array_equal(found, never)


def test_a_low_rank_training_that_cannot_be_is_refused(world, refused, tmp_path):
    words = world.expert_words(tmp_path / "out")
    assert "ffn_rank must be at most 32" in refused(*words, "--rank", "33")
    assert "ffn_rank must be 0 or more, found -1" in refused(*words, "--rank", "-1")
    assert not (tmp_path / "out").exists()
