"""Packages: what goes in comes out, what was changed is refused, a kill leaves old or new."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hostile.sealing import seal

import flexolmo_jax as fo
from flexolmo_jax.federation import merge as merging
from flexolmo_jax.federation import package as packaging
from flexolmo_jax.federation.anchor import read_anchor, write_anchor
from flexolmo_jax.federation.expert import read_expert, write_expert
from flexolmo_jax.federation.merge import write_tuned
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.storage import tensors


def bits(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in tensors.named(tree).items()}


def model_bits(path):
    model = fo.load(path)
    return model.expert_names, bits((model.backbone, model.experts))


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_a_package_gives_back_every_bit(world, tmp_path):
    anchor = read_anchor(world.anchor)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    expert = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), anchor.weights.public)
    write_expert(tmp_path / "package", expert, "mine", anchor, {"licence": "CC0-1.0"})
    assert bits(read_expert(tmp_path / "package", anchor)) == bits(expert)
    manifest = read_manifest(tmp_path / "package")
    assert manifest["licence"] == "CC0-1.0" and manifest["privacy"].startswith("none")
    assert all(entry["shape"][1] == 1 for entry in manifest["tensors"].values())


def test_an_anchor_gives_back_all_it_holds(world, tmp_path):
    anchor = read_anchor(world.anchor)
    text = ["öffentlich\n", "public \u2028 text"]
    path = tmp_path / "anchor"
    write_anchor(path, anchor.weights, anchor.config, anchor.tokenizer, text, {})
    again = read_anchor(path)
    assert bits(again.weights) == bits(anchor.weights)
    assert again.public_text == text
    assert (again.config, again.identity) == (anchor.config, anchor.identity)
    assert again.tokenizer.digest == anchor.tokenizer.digest


def test_merging_is_concatenation(world):
    anchor = read_anchor(world.anchor)
    merged = fo.load(world.merged)
    assert merged.expert_names == ("public", "math", "code")
    assert bits(merged.backbone) == bits(anchor.weights.backbone)
    owners = [read_expert(path, anchor) for path in world.experts.values()]
    for index, stack in enumerate([anchor.weights.public, *owners]):
        here = jax.tree.map(lambda x, i=index: x[:, i : i + 1], merged.experts)
        assert bits(here) == bits(stack)


def test_a_merged_model_is_one_small_file(world):
    (file,) = files_of(world.merged)
    assert file.name == "manifest.json" and file.stat().st_size < 4096


# Tampering.


@pytest.mark.parametrize("part", ["anchor", "experts/math", "merged"])
def test_a_flipped_bit_in_any_file_is_refused_by_name(copied, part):
    files = files_of(copied.root / part)
    assert part == "merged" or len(files) >= 10
    rng = np.random.default_rng(0)
    for file in files:
        content = file.read_bytes()
        changed = bytearray(content or b"x")  # an empty file gets a byte
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(changed))
        with pytest.raises(ValueError) as error:
            fo.load(copied.merged)
        assert str(file) in str(error.value) or str(file.resolve()) in os.path.normpath(
            str(error.value)
        ), (file, error.value)
        file.write_bytes(content)
    fo.load(copied.merged)


@pytest.mark.parametrize("part", ["anchor", "experts/math"])
def test_a_missing_file_is_refused_by_name(copied, part):
    for file in files_of(copied.root / part):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match="missing from the package|no manifest.json") as error:
            fo.load(copied.merged)
        assert file.name in str(error.value)
        file.write_bytes(content)
    fo.load(copied.merged)


@pytest.mark.parametrize("part", ["anchor", "experts/math", "merged"])
@pytest.mark.parametrize("name", ["notes.txt", "params/state/extra/0", ".hidden"])
def test_an_extra_file_is_refused_by_name(copied, part, name):
    if part == "merged" and name.startswith("params"):
        return  # a leftover of a tuned router; see below
    file = copied.root / part / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x")
    with pytest.raises(ValueError, match=f"{name}.*: unexpected file; delete it"):
        fo.load(copied.merged)


def test_a_damaged_tensor_is_named(copied):
    (file,) = [
        f for f in files_of(copied.experts["math"]) if "gate" in str(f) and f.name[0].isdigit()
    ]
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"\(tensor feed_forward.gate\): changed after"):
        fo.load(copied.merged)


def edits(manifest):
    """Texts that somebody might put in the manifest's place."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    yield text.replace('"name": "math"', '"name": "maths"')
    yield text.replace("none: trained without", "yes: trained with")
    yield text.replace('"licence": "unspecified"', '"licence": "MIT"')
    yield text.replace('"format": 2', '"format": 3')
    yield text.replace("\n ", "\n  ")
    yield text[:-1]
    yield text[: len(text) // 2]
    yield ""
    yield "[]"
    yield "3"
    yield json.dumps({k: v for k, v in manifest.items() if k != "digest"})


def test_an_edited_manifest_is_refused(copied):
    file = copied.experts["math"] / "manifest.json"
    original = file.read_text(encoding="utf-8")
    for edited in edits(json.loads(original)):
        assert edited != original
        file.write_text(edited, encoding="utf-8")
        with pytest.raises(ValueError, match="manifest.json: (damaged|the manifest was changed)"):
            fo.load(copied.merged)
    file.write_text(original, encoding="utf-8")
    fo.load(copied.merged)


def test_a_manifest_of_another_version_says_so(copied):
    package = copied.experts["math"]
    seal(package, contents=False, format=4)
    with pytest.raises(ValueError, match="expected package format 2 or 3, found 4; another ver"):
        fo.load(copied.merged)


def test_another_package_in_the_place_of_a_merged_one_is_refused(copied, make_expert):
    shutil.rmtree(copied.experts["math"])
    make_expert(copied.experts["math"], "math")
    with pytest.raises(ValueError, match="not the package that was merged as 'math'"):
        fo.load(copied.merged)


def test_another_anchor_in_the_place_of_the_merged_one_is_refused(copied, other_anchor):
    shutil.rmtree(copied.anchor)
    shutil.copytree(other_anchor("weights"), copied.anchor)
    with pytest.raises(ValueError, match="not the anchor that was merged"):
        fo.load(copied.merged)


# Packages that do not fit.


@pytest.fixture
def other_anchor(world, tmp_path):
    """other_anchor(what): an anchor that differs from the world's in that."""

    def make(what):
        anchor = read_anchor(world.anchor)
        weights, config, tokenizer = anchor.weights, anchor.config, anchor.tokenizer
        if what == "weights":
            weights = jax.tree.map(lambda x: x * 1.0001, weights)
        if what == "tokenizer":
            tokenizer = type(tokenizer).train(["another public text"] * 4, 300)
        if what == "norm_eps":
            config = config.replace(norm_eps=1e-5)
        path = tmp_path / f"another {what}"
        write_anchor(path, weights, config, tokenizer, anchor.public_text, {})
        return path

    return make


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "made for another anchor: expected .*, found"),
        ("tokenizer", "made for another tokenizer: expected sha256"),
        ("norm_eps", "made for another model config: expected norm_eps=1e-05, found 1e-06"),
    ],
)
def test_a_package_for_something_else_is_refused_saying_which(
    world, tmp_path, other_anchor, what, message
):
    other, package = other_anchor(what), world.experts["math"]
    for attempt in (
        lambda: fo.merge(other, [package], tmp_path / "merged"),
        lambda: fo.load(package, anchor=other),
    ):
        with pytest.raises(ValueError, match=f"experts/math: {message}"):
            attempt()
    fo.merge(other, [], tmp_path / "merged")
    with pytest.raises(ValueError, match=message):
        fo.add_expert(tmp_path / "merged", package)
    assert fo.load(tmp_path / "merged").expert_names == ("public",)


def test_two_packages_of_one_name_are_refused(world, tmp_path, make_expert):
    other = make_expert(tmp_path / "other", "math", seed=1)
    with pytest.raises(ValueError, match="two packages are named 'math'"):
        fo.merge(world.anchor, [world.experts["math"], other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    fo.merge(world.anchor, [world.experts["math"]], tmp_path / "merged")
    with pytest.raises(ValueError, match="two packages are named 'math'"):
        fo.add_expert(tmp_path / "merged", other)
    assert fo.load(tmp_path / "merged").expert_names == ("public", "math")


@pytest.mark.parametrize("name", ["public", "", "a/b", "../x", "-x", "a b", "x" * 65, "é"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path, make_expert, name):
    with pytest.raises(ValueError, match="cannot be an expert's name"):
        make_expert(tmp_path / "package", name)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_written_over(world, tmp_path, make_expert):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for attempt in (
        lambda: make_expert(tmp_path / "out", "mine"),
        lambda: fo.merge(world.anchor, [], tmp_path / "out"),
        lambda: fo.merge(world.anchor, [], tmp_path / "out" / "thesis.txt"),
    ):
        with pytest.raises(ValueError, match="already there"):
            attempt()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_a_package_of_another_kind_is_refused(world, tmp_path):
    for attempt in (
        lambda: fo.merge(world.experts["math"], [], tmp_path / "m"),
        lambda: fo.merge(world.anchor, [world.anchor], tmp_path / "m"),
        lambda: fo.add_expert(world.experts["math"], world.experts["code"]),
    ):
        with pytest.raises(ValueError, match="expected a package of kind"):
            attempt()


# Adding, removing, moving.


def test_add_and_remove(world, copied, make_expert, tmp_path):
    third = make_expert(tmp_path / "third", "third")
    before = model_bits(copied.merged)
    fo.add_expert(copied.merged, third)
    assert fo.load(copied.merged).expert_names == ("public", "math", "code", "third")
    fo.remove_expert(copied.merged, "math")
    assert fo.load(copied.merged).expert_names == ("public", "code", "third")
    with pytest.raises(ValueError, match="no expert named 'math'; there are code, third"):
        fo.remove_expert(copied.merged, "math")
    fo.remove_expert(copied.merged, "third")
    fo.remove_expert(copied.merged, "code")
    assert model_bits(copied.merged) == model_bits(world.anchor)
    for name in ("math", "code"):
        fo.add_expert(copied.merged, copied.experts[name])
    assert model_bits(copied.merged) == before


def test_an_expert_can_be_taken_out_after_its_package_is_gone(copied):
    shutil.rmtree(copied.experts["code"])
    with pytest.raises(ValueError, match="experts/code: no such folder"):
        fo.load(copied.merged)
    fo.remove_expert(copied.merged, "code")
    assert fo.load(copied.merged).expert_names == ("public", "math")


def test_a_merged_model_moves_with_its_parts(copied, tmp_path):
    before = model_bits(copied.merged)
    copied.root.rename(tmp_path / "elsewhere")
    assert model_bits(tmp_path / "elsewhere" / "merged") == before


def test_a_merged_model_is_found_from_anywhere(copied, tmp_path, monkeypatch):
    before = model_bits(copied.merged)
    monkeypatch.chdir(copied.root)
    fo.merge("anchor", ["experts/math", "experts/code"], "deep/er/merged")
    monkeypatch.chdir(tmp_path)
    assert model_bits(copied.root / "deep" / "er" / "merged") == before


def test_a_package_finds_the_anchor_near_it(copied, other_anchor, tmp_path):
    assert fo.load(copied.experts["math"]).expert_names == ("public", "math")
    shutil.copytree(copied.experts["math"], tmp_path / "alone" / "a" / "b" / "math")
    with pytest.raises(ValueError, match="an expert package needs its anchor"):
        fo.load(tmp_path / "alone" / "a" / "b" / "math")


# A kill at any moment. A photograph is what a kill at that moment would leave on the disk.


class Photographer:
    """Copies a folder before and after everything that a command does to the disk."""

    def __init__(self, monkeypatch, folder: Path, album: Path):
        self.folder, self.album = folder, album
        self.count, self.last, self.off = 0, None, False
        for owner, name in (
            (os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"),
            (tensors, "save"), (Path, "write_text"), (Path, "unlink"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))

    def around(self, real):
        def act(*arguments, **options):
            self.take()
            result = real(*arguments, **options)
            self.take()
            return result

        return act

    def take(self):
        if self.off:
            return
        self.off = True
        sizes = [(p, p.stat().st_size) for p in sorted(self.folder.rglob("*"))]
        if sizes != self.last:
            shutil.copytree(self.folder, self.album / f"{self.count:04}" / "world")
            self.last, self.count = sizes, self.count + 1
        self.off = False


@pytest.fixture
def tuned(copied):
    """The merged model with a tuned router."""
    router = fo.load(copied.merged).experts.router
    router.row[...] += 0.25
    write_tuned(copied.root / "tuned", copied.merged, jax.device_get(router))
    return copied.root / "tuned"


COMMANDS = {
    "merge": lambda root: fo.merge(root / "anchor", [root / "experts/math"], root / "new"),
    "add": lambda root: fo.add_expert(root / "merged", root / "third"),
    "remove": lambda root: fo.remove_expert(root / "merged", "math"),
    "remove from a tuned model": lambda root: fo.remove_expert(root / "tuned", "math"),
    "package": lambda root: COMMANDS["make"](root / "experts/new", "new", seed=3),
    "tune": lambda root: write_tuned(
        root / "new", root / "merged", fo.load(root / "merged").experts.router
    ),
}
WRITTEN = {
    "merge": "new", "add": "merged", "remove": "merged", "remove from a tuned model": "tuned",
    "package": "experts/new", "tune": "new",
}  # fmt: skip


@pytest.mark.parametrize("command", WRITTEN)
def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new_one(
    copied, tuned, make_expert, monkeypatch, tmp_path, command
):
    make_expert(copied.root / "third", "third")
    monkeypatch.setitem(COMMANDS, "make", make_expert)

    def state(root):
        path = root / WRITTEN[command]
        return model_bits(path) if path.exists() else None

    old = state(copied.root)
    with monkeypatch.context() as patch:
        photographer = Photographer(patch, copied.root, tmp_path / "album")
        COMMANDS[command](copied.root)
        photographer.off = True
    new = state(copied.root)
    assert new is not None and new != old
    album = [photograph / "world" for photograph in sorted((tmp_path / "album").iterdir())]
    states = [state(root) for root in album]
    before = states.count(old)
    assert before >= 1 and states == [old] * before + [new] * (len(album) - before)
    COMMANDS[command](album[before - 1])  # and the command can be given again
    assert state(album[before - 1]) == new
    left = [p for p in copied.root.rglob("*") if "partial" in p.name]
    assert not left


def test_what_a_killed_write_left_is_swept_up_by_the_next(tmp_path, make_expert):
    left = tmp_path / f".package.{'0' * 32}.partial"
    (left / "params").mkdir(parents=True)
    make_expert(tmp_path / "package", "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


def test_sweeping_up_spares_a_neighbour_that_is_being_written(tmp_path, make_expert):
    """Another owner's process may be writing `math.v2` while this one writes `math`."""
    writing = tmp_path / f".math.v2.{'0' * 32}.partial"
    writing.mkdir()
    make_expert(tmp_path / "math", "math")
    assert writing.exists()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(packaging.tensors, "save"), (packaging.os, "rename"), (packaging.os, "fsync")],
)
def test_a_write_that_fails_leaves_nothing(tmp_path, make_expert, monkeypatch, owner, name):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(OSError, match="No space left"):
            make_expert(tmp_path / "package", "mine")
    assert not list(tmp_path.iterdir())
    make_expert(tmp_path / "package", "mine")


def test_a_change_that_fails_leaves_the_model_as_it_was(copied, monkeypatch):
    before = model_bits(copied.merged)
    with monkeypatch.context() as patch:
        patch.setattr(merging.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            fo.remove_expert(copied.merged, "math")
    assert model_bits(copied.merged) == before
    assert [p.name for p in copied.merged.iterdir()] == ["manifest.json"]
