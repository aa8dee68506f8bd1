"""Packages in integers: in every command what those are whose floats they stand for."""

import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from hostile.sealing import seal

import flexolmo_jax as fo
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.compress import compress
from flexolmo_jax.federation.expert import read_expert, write_expert
from flexolmo_jax.federation.package import Package, read_manifest
from flexolmo_jax.storage.tensors import bytes_of, named

TOKENS = np.arange(60).reshape(3, 20)
FORMS = {
    "eight": {"bits": 8},
    "four": {"bits": 4, "group": 16},
    "small": {"bits": 4, "rank": 5},
}


@pytest.fixture(scope="module")
def packages(world, make_expert, tmp_path_factory):
    """By name: one in floats, and one of each form."""
    folder = tmp_path_factory.mktemp("integers")
    found = {"math": world.experts["math"]}
    for seed, (name, form) in enumerate(FORMS.items()):
        floats = make_expert(folder / f"{name}.floats", name, seed=seed)
        compress(floats, folder / name, anchor=world.anchor, **form)
        found[name] = folder / name
    return found


def merged_logits(world, packages, folder, **choice):
    fo.merge(world.anchor, packages, folder, allow_share=None)
    return fo.load(folder).logits(TOKENS, **choice)


def test_it_is_as_small_as_its_bits_and_near_what_it_was(world, packages):
    anchor = read_anchor(world.anchor)
    for name, (least, bytes_of_full) in {"eight": (0.01, 0.3), "four": (0.12, 0.2)}.items():
        floats = packages[name].with_name(f"{name}.floats")
        before, after = (named(read_expert(path, anchor)) for path in (floats, packages[name]))
        assert before.keys() == after.keys()
        for tensor, leaf in before.items():
            assert after[tensor].dtype == "float32"
            error = np.linalg.norm(after[tensor] - leaf)
            bound = least * np.linalg.norm(leaf) if "feed_forward" in tensor else 0
            assert error <= bound, tensor
        sizes = [bytes_of(Package.open(path).weights) for path in (floats, packages[name])]
        assert sizes[1] < bytes_of_full * sizes[0]


def test_the_manifest_says_what_it_holds(packages):
    for name, form in FORMS.items():
        before = read_manifest(packages[name].with_name(f"{name}.floats"))
        after = read_manifest(packages[name])
        assert (before["format"], after["format"]) == (2, 3)
        for key in before.keys() - {"format", "made_by", "tensors", "files", "digest"}:
            assert after[key] == before[key], key
        group = {"group": 64} if form["bits"] == 4 else {}
        assert after["compressed"] == {"from": before["digest"], **group, **form}
        kind = f"int{form['bits']}"
        dtypes = {name: entry["dtype"] for name, entry in after["tensors"].items()}
        assert {dtypes[n] for n in dtypes if not n.endswith(".peak")} == {kind, "float32"}
        assert dtypes["router.row"] == dtypes["router.bias"] == "float32"


def test_it_computes_what_its_floats_compute_bit_for_bit(world, packages, tmp_path):
    anchor = read_anchor(world.anchor)
    in_floats = []
    for name, package in packages.items():
        opened = Package.open(package).weights
        floats = jax.tree.map(lambda leaf: np.asarray(leaf), opened)
        write_expert(tmp_path / name, floats, name, anchor, {})
        in_floats.append(tmp_path / name)
    found = merged_logits(world, packages.values(), tmp_path / "integers")
    np.testing.assert_array_equal(found, merged_logits(world, in_floats, tmp_path / "floats"))
    mesh = fo.make_mesh(devices=jax.devices()[:1])
    spread = fo.load(tmp_path / "integers", mesh=mesh)
    np.testing.assert_allclose(spread.logits(TOKENS), found, atol=1e-4)


def test_one_that_is_switched_off_was_never_merged_bit_for_bit(world, packages, tmp_path):
    merged_logits(world, packages.values(), tmp_path / "all")
    model = fo.load(tmp_path / "all")
    for number, kept in enumerate(itertools.combinations(packages, 3)):
        (off,) = packages.keys() - set(kept)
        never = merged_logits(world, [packages[n] for n in kept], tmp_path / f"kept{number}")
        np.testing.assert_array_equal(model.logits(TOKENS, without=[off]), never)
    fo.remove_expert(tmp_path / "all", off)
    np.testing.assert_array_equal(fo.load(tmp_path / "all").logits(TOKENS), never)


@pytest.mark.parametrize("tensor", ["feed_forward.gate", "feed_forward.gate.peak"])
def test_a_changed_integer_or_scale_is_found(packages, refused, tmp_path, tensor):
    copy = tmp_path / "four"
    shutil.copytree(packages["four"], copy)
    file = copy / "params" / "state" / tensor / "c/0/0/0/0"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(bytes(content))
    said = refused("inspect", copy)
    assert f"(tensor {tensor}): changed after the package was written" in said


def test_what_does_not_belong_together_is_refused(packages, tmp_path):
    def changed(change, says):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(packages["four"], copy)
        manifest = read_manifest(copy)
        change(manifest)
        seal(copy, contents=False, **manifest)
        with pytest.raises(ValueError, match=re.escape(says)):
            Package.open(copy)

    changed(lambda m: m.update(format=2), "format 2: expected 3 with matrices of integers")
    changed(lambda m: m["compressed"].update(group=32), "expected a tensor feed_forward.down.peak")
    changed(lambda m: m["compressed"].update(bits=8), "field 'compressed'")
    gate = "feed_forward.gate"
    changed(lambda m: m["tensors"].pop(f"{gate}.peak"), f"expected a tensor {gate}.peak")
    changed(lambda m: m["tensors"][gate].update(dtype="int8"), "expected shape")
    changed(lambda m: m["tensors"][gate].update(dtype="float32"), f"{gate}.peak, which has no")


def test_the_command_shows_what_it_costs_on_both_texts(world, flexolmo, tmp_path):
    out = tmp_path / "small"
    words = ("compress", world.experts["math"], "--out", out, "--bits", "4", "--group", "16")
    code, printed, error = flexolmo(*words, "--anchor", world.anchor, "--data", world.texts["math"])
    assert code == 0, error
    for said in ("error of rounding", "the owner's text", "public text", "before", "after"):
        assert said in printed + error
    code, printed, _ = flexolmo("inspect", out, "--json")
    assert json.loads(printed)["compressed"]["bits"] == 4
    full, found = (
        json.loads(flexolmo("inspect", path, "--json")[1])["parts"]["feed_forward"]
        for path in (world.experts["math"], out)
    )
    assert found == {**full, "bits": 4}


def test_what_cannot_be_rounded_is_said_in_one_line(world, refused, tmp_path):
    out, words = tmp_path / "out", ("compress", world.experts["math"], "--anchor", world.anchor)
    assert "nothing says what to make smaller" in refused(*words, "--out", out)
    assert "a group is for 4 bits" in refused(*words, "--out", out, "--bits", "8", "--group", "9")
    assert "a group is for bits=4" in refused(*words, "--out", out, "--rank", "2", "--group", "9")
    said = refused(*words, "--out", out, "--bits", "4", "--group", "0")
    assert "group must be 1 or more, found 0" in said
    assert "invalid choice: 3" in refused(*words, "--out", out, "--bits", "3")
    assert not out.exists()
