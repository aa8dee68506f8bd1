"""A run folder: one process at a time, the same run by content, and done only if it is that."""

import dataclasses
import json
import os
import shutil

import pytest

from flexolmo_jax.data.sources import fingerprint
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.training.run import LOCK, check_run, describe_run, record_run
from flexolmo_jax.training.stages.expert import train_expert
from flexolmo_jax.training.step import train_step


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """The words of a training that has ended, in a folder of its own."""
    folder = tmp_path_factory.mktemp("done")
    text = shutil.copy(world.texts["math"], folder / "math.jsonl")
    words = world.expert_words(folder / "mine", "--steps", "2", "--resume", data=text)
    return folder, words


def changed(words, **options):
    """The words with other values behind --NAME."""
    out = list(words)
    for name, value in options.items():
        if f"--{name}" in out:
            out[out.index(f"--{name}") + 1] = value
        else:
            out += [f"--{name}", value]
    return out


def test_already_done_is_only_what_was_asked_for(world, done, flexolmo, refused):
    folder, words = done
    assert flexolmo(*words)[0] == 0
    before = read_manifest(folder / "mine")["digest"]
    code, said, _ = flexolmo(*words)
    assert code == 0 and "mine: already done" in said
    for change, message in (
        ({"name": "yours"}, "another name: it was mine, now yours"),
        ({"seed": "5"}, "another seed: it was 0, now 5"),
        ({"steps": "3"}, "another steps: it was 2, now 3"),
        ({"data": world.texts["code"]}, "another text: "),
        ({"public": "corpus:public"}, "another public"),
        (
            {"contact": "me@example.org"},
            "with another contact: expected me@example.org, found unspecified",
        ),
        ({"dp-epsilon": "8", "dp-delta": "1e-5"}, "cannot resume with another"),
        ({"run": folder / "other.run"}, "does not say how it was made"),
        ({"anchor": folder / "none"}, "no such folder"),
    ):
        assert message in refused(*changed(words, **change)), change
    assert read_manifest(folder / "mine")["digest"] == before
    assert sorted(p.name for p in folder.iterdir()) == ["math.jsonl", "mine", "mine.run"]


def test_a_finished_run_whose_package_is_another_is_not_done(world, done, tmp_path, flexolmo):
    folder, words = done
    flexolmo(*words)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(world.experts["math"], tmp_path / "mine")
    here = changed(words, out=tmp_path / "mine", name="mine")
    code, _, error = flexolmo(*here)
    assert code == 2 and "already exists with another name: expected mine, found math" in error
    shutil.rmtree(tmp_path / "mine")
    assert flexolmo(*changed(here, contact="me@example.org"))[0] == 0  # written again
    assert read_manifest(tmp_path / "mine")["contact"] == "me@example.org"


def test_only_the_owner_can_read_a_run_folder(done, flexolmo):
    folder, words = done
    flexolmo(*words)
    run = folder / "mine.run"
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (run, run / "data")}
    modes["checkpoints"] = oct((run / "checkpoints").stat().st_mode & 0o777)
    assert modes == dict.fromkeys(("mine.run", "data", "checkpoints"), "0o700")
    assert (folder / "mine").stat().st_mode & 0o077  # the package is for others


def test_a_second_process_in_a_run_is_refused(world, done, refused, tmp_path):
    _, words = done
    run = tmp_path / "run"
    run.mkdir()
    with locked(run / LOCK, "", ""):
        said = refused(*changed(words, out=tmp_path / "out", run=run))
    assert f"process {os.getpid()} on" in said and "is training in this run folder" in said


def recorded(config, source, run, **more):
    wanted = describe_run(config, source=fingerprint(source), source_at=str(source), **more)
    record_run(run, wanted)


def test_a_run_is_the_same_by_content(world, tmp_path, monkeypatch):
    """However the path is written, whenever and wherever the files were copied."""
    config = world.config("alone")
    text = shutil.copy(world.texts["math"], tmp_path / "text.jsonl")
    recorded(config, text, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    shutil.copyfile(text, tmp_path / "elsewhere" / "renamed.jsonl")
    os.utime("elsewhere/renamed.jsonl", (1e9, 1e9))
    os.symlink(text, "link.jsonl")
    for spelled in ("text.jsonl", "./text.jsonl", text, "elsewhere", "link.jsonl"):
        for change in ({}, {"contact": "a@b.example"}, {"licence": "CC0-1.0"}, {"log_every": 7}):
            same = dataclasses.replace(config, **change)
            wanted = describe_run(same, source=fingerprint(spelled), source_at=str(spelled))
            check_run(tmp_path / "run", wanted, True, same)
    stat = os.stat(text)
    text.write_bytes(text.read_bytes().replace(b"e", b"a", 1))  # as long, and as old
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    wanted = describe_run(config, source=fingerprint(text), source_at=str(text))
    with pytest.raises(ValueError, match="cannot resume with another text"):
        check_run(tmp_path / "run", wanted, True, config)


def test_another_nested_value_is_named_in_full(world, tmp_path):
    config = world.config("alone")
    recorded(config, world.texts["math"], tmp_path)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, length=16))
    wanted = describe_run(other, source=fingerprint(world.texts["math"]), source_at="")
    with pytest.raises(ValueError, match=r"another data\.length: it was 32, now 16"):
        check_run(tmp_path, wanted, True, other)


@pytest.mark.parametrize("old", [{"contact": "unspecified"}, {"gating": "alone"}])
def test_a_run_of_an_older_version_is_refused_with_the_reason(world, tmp_path, old):
    config = world.config("alone")
    wanted = describe_run(config, source=fingerprint(world.texts["math"]), source_at="")
    (tmp_path / "config.json").write_text(json.dumps(wanted | old))
    with pytest.raises(ValueError, match="an older version of flexolmo_jax started this run"):
        check_run(tmp_path, wanted, True, config)


def test_a_run_from_before_there_was_a_choice_of_optimizers_is_the_same_run(world, tmp_path):
    config = world.config("alone")
    facts = {"source": fingerprint(world.texts["math"]), "source_at": ""}
    wanted = describe_run(config, **facts)
    old = json.loads(json.dumps(wanted))
    del old["optimizer"]["name"], old["optimizer"]["adamw_learning_rate"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_run(tmp_path, wanted, True, config)
    optimizer = dataclasses.replace(config.optimizer, name="muon")
    muon = dataclasses.replace(config, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"another optimizer\.name: it was adamw, now muon"):
        check_run(tmp_path, describe_run(muon, **facts), True, muon)


def test_a_second_run_of_the_same_kind_compiles_no_step(world, tmp_path):
    """As in a notebook or a study, which trains the experts of several owners."""

    def train(name):
        train_expert(
            world.config("alone", steps=2), anchor=str(world.anchor), data=str(world.texts[name]),
            name=name, out=str(tmp_path / name), run=str(tmp_path / f"{name}.run"),
        )  # fmt: skip
        return train_step._cache_size()

    assert train("math") == train("code")
