"""Where a command writes is checked before it does any work."""

import json
from collections import namedtuple

import pytest

from flexolmo_jax.storage import outputs


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def place(tmp_path):
    """A folder with texts, a package, a Hugging Face model and a run; nothing may be added."""
    root = tmp_path / "place"
    for name, file, content in (
        ("texts", "own.jsonl", {"text": "x"}),
        ("package", "manifest.json", {"kind": "expert"}),
        ("merged", "manifest.json", {"kind": "merged"}),
        ("hf", "config.json", {"model_type": "olmo2"}),
        ("old.run", "config.json", {"steps": 1, "optimizer": {}, "data": {}}),
    ):
        (root / name).mkdir(parents=True)
        (root / name / file).write_text(json.dumps(content))
    (root / "empty").mkdir()
    (root / "link").symlink_to(root / "empty")
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "into_texts").symlink_to(root / "texts")
    return root


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("link", "is a link to"),
        ("dangling", "is a link to"),
        ("texts/own.jsonl", "already there"),
        ("texts", "already there"),
        ("texts/x", "lies in"),
        ("texts/deep/x", "lies in"),
        ("into_texts/x", "lies in"),
        ("empty/../texts/x", "lies in"),
        ("package/x", "a package of kind expert"),
        ("package/deep/x", "a package of kind expert"),
        ("merged/x", "a merged model"),
        ("hf/x", "a Hugging Face model"),
        ("old.run/x", "the folder of a run"),
        ("texts/own.jsonl/x", "lies in"),
        ("dangling/x", "cannot be written"),
        ("n" * 230, "cannot be written"),
    ],
)
def test_a_place_that_would_break_something_is_refused_and_left_as_it_was(place, out, why):
    before = names(place)
    with pytest.raises(ValueError, match=why):
        outputs.check_new_folder(place / out, [place / "texts"])
    assert names(place) == before


@pytest.mark.parametrize("out", [".", "../empty", "../link/."])
def test_the_folder_that_a_command_runs_in_is_not_replaced(place, out, monkeypatch):
    """It would be another one afterwards, and relative paths would lead nowhere."""
    monkeypatch.chdir(place / "empty")
    with pytest.raises(ValueError, match="the folder that this command runs in|is a link to"):
        outputs.check_new_folder(out)
    outputs.check_new_folder("new")


@pytest.mark.parametrize("out", ["new", "deep/and/new", "empty", "link/x"])
def test_a_place_that_is_free_is_taken_and_nothing_is_made_by_the_check(place, out):
    before = names(place)
    outputs.check_new_folder(place / out, [place / "texts", "corpus:public"])
    outputs.check_training(place / out, place / "x.run", [place / "texts"])
    assert names(place) == before


def test_a_mount_point_is_refused(place, monkeypatch):
    """Also a bind mount of the same file system, which looks like any folder."""
    found = outputs.Path.read_text
    mounted = str(place / "empty").replace(" ", "\\040")

    def read_text(self, *args, **more):
        if str(self) == "/proc/self/mountinfo":
            return f"36 35 98:0 /mnt1 {mounted} rw,noatime master:1 - ext4 /dev/root rw\n"
        return found(self, *args, **more)

    monkeypatch.setattr(outputs.Path, "read_text", read_text)
    with pytest.raises(ValueError, match="is a mount point"):
        outputs.check_new_folder(place / "empty")


def test_the_parent_must_be_writable(place, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(outputs.Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="cannot be written .Permission denied"):
        outputs.check_new_folder(place / "new")


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ("out", "would lie in the package"),
        ("out/run", "would lie in the package"),
        ("texts/x.run", "lies in"),
        ("package", "a package of kind expert"),
        ("hf", "a Hugging Face model"),
        ("hf/x.run", "a Hugging Face model"),
        ("old.run/again", "the folder of a run"),
        (".", "would hold"),
        ("texts/own.jsonl", "expected a folder"),
        ("dangling", "expected a folder"),
    ],
)
def test_a_run_folder_apart_from_everything_else(place, run, why):
    before = names(place)
    with pytest.raises(ValueError, match=why):
        outputs.check_training(place / "out", place / run, [place / "texts"])
    assert names(place) == before


def test_nothing_of_a_training_lies_in_another_part_of_it(place):
    check = outputs.check_training
    out, run, reads = place / "out", place / "out.run", [place / "texts"]
    with pytest.raises(ValueError, match="the ledger would lie in the package"):
        check(out, run, reads, ledger=out / "budget.json")
    with pytest.raises(ValueError, match="a package of kind expert"):
        check(out, run, reads, ledger=place / "package" / "budget.json")
    with pytest.raises(ValueError, match="lies in .*texts, which is read"):
        check(out, run, reads, ledger=place / "texts" / "budget.json")
    with pytest.raises(ValueError, match="the profile would lie in the package"):
        check(out, run, reads, profile=out / "trace")
    with pytest.raises(ValueError, match="would lie in the run folder"):
        check(run / "out", run, reads)
    check(out, place / "old.run", reads, ledger=place / "budget.json")  # to be resumed


def test_too_little_room_is_refused_with_numbers(place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    sizes = {"text": 0, "state": 12 * 10**9, "packaged": 10**9, "saves": 5}
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: usage(10**12, 0, 20 * 10**9))
    where = (place / "out", place / "out.run")
    with pytest.raises(ValueError, match="28 GB more are needed .*package 4 GB.*20 GB are free"):
        outputs.check_room(*where, **sizes)
    outputs.check_room(*where, **{**sizes, "saves": 1})  # 12 GB of one checkpoint, and the package


# The commands.


def test_no_command_starts_that_could_not_write(world, refused, tmp_path):
    link, taken = tmp_path / "link", tmp_path / "taken.jsonl"
    link.symlink_to(tmp_path / "nowhere")
    taken.write_text("my notes")
    inside = world.anchor / "x"
    public = world.texts["public"]
    commands = [
        world.expert_words(link),
        world.expert_words(inside),
        world.expert_words(tmp_path / "a", run=tmp_path / "a"),
        world.expert_words(tmp_path / "a", "--dp-epsilon", 1, "--dp-ledger", inside),
        ("train", "anchor", world.config_file("anchor"), "--data", public, "--out", inside),
        ("train", "router", world.config_file("router"), "--data", public, "--out", inside)
        + ("--model", world.merged),
        ("merge", "--anchor", world.anchor, "--expert", *world.experts.values(), "--out", link),
        ("merge", "--anchor", world.anchor, "--expert", *world.experts.values(), "--out", inside),
        ("data", "proxies", "--data", public, "--public", "corpus:public", "--out", taken),
        ("data", "proxies", "--data", public, "--public", "corpus:public", "--out", inside),
        ("data", "flexmix", world.root, link),
        ("data", "fetch", world.root / "texts"),
        ("data", "tasks", world.root / "texts"),
        ("study", "ci", "--out", inside),
        ("demo", "--out", link),
        ("demo", "--out", inside),
        ("audit", "twin", "--out", inside),
        ("audit", "extraction", "--model", world.merged, "--data", public, "--out", inside),
        ("audit", "extraction", "--model", world.merged, "--data", public, "--out", world.root),
    ]
    before = names(world.root)
    for command in commands:
        refused(*command)
        assert names(world.root) == before, command
    assert taken.read_text() == "my notes"
    assert names(tmp_path) == ["link", "taken.jsonl"]


def test_public_text_is_read_before_the_training_that_it_is_needed_after(
    world, refused, flexolmo, tmp_path
):
    out, rows = tmp_path / "out", world.texts["math"].read_text().splitlines()
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("\n".join(json.dumps({"content": json.loads(r)["text"]}) for r in rows))
    for public in (tmp_path / "none.jsonl", renamed):
        refused(*world.expert_words(out, "--public", public))
        assert not (tmp_path / "out.run").exists()
    # With the field of the owner's text; and public text that is as usual, beside such a text.
    for name, public in (("one", renamed), ("two", world.texts["public"])):
        words = ("--public", public, "--data.text-field", "content", "--steps", "2")
        assert flexolmo(*world.expert_words(tmp_path / name, *words, data=renamed))[0] == 0


def test_a_router_without_experts_and_windows_beyond_the_anchors_are_refused(
    world, copied, refused, flexolmo, tmp_path
):
    out, run = tmp_path / "out", tmp_path / "out.run"
    assert "longer than" in refused(*world.expert_words(out, "--data.length", "128"))
    tune = ("train", "router", world.config_file("router"), "--data", world.texts["public"])
    tune = (*tune, "--model", copied.merged, "--out", out)
    assert "longer than" in refused(*tune, "--data.length", "128")
    assert flexolmo("experts", "remove", copied.merged, "math", "code")[0] == 0
    assert "has no expert beside the public one" in refused(*tune)
    assert not out.exists() and not run.exists()


@pytest.mark.parametrize("stage", ["anchor", "pair"])
def test_a_refused_start_does_not_stand_in_the_way_of_the_corrected_one(
    world, refused, tmp_path, stage, monkeypatch
):
    out, run = tmp_path / "out", tmp_path / "run"
    words = world.expert_words(out, config="pair", run=run)
    if stage == "anchor":
        words = ("train", "anchor", world.config_file("anchor"), "--out", out, "--run", run)
        words = (*words, "--data", world.texts["public"])
    missing = tmp_path / "missing.npy"
    assert "missing.npy" in refused(*words, "--domain-embedding", missing)
    assert not (run / "config.json").exists()

    def uneven(*_):
        raise ValueError("the batch cannot be divided among the devices")

    monkeypatch.setattr(f"flexolmo_jax.training.stages.{MODULES[stage]}.mesh_of", uneven)
    assert "cannot be divided" in refused(*words)
    assert not (run / "config.json").exists()


MODULES = {"anchor": "anchor", "pair": "expert"}
