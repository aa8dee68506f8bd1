"""Traces of a model's answers: a source that is off is neither searched nor named."""

import json

import pytest

import flexolmo_jax as fo
from flexolmo_jax.tracing.build import build_index
from flexolmo_jax.tracing.index import Index


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory):
    """The indexes of the small world's owners, whose text is the same but for the name."""
    folder = tmp_path_factory.mktemp("indexes")
    for name in ("math", "code"):
        text = "The same words stand with both of them, word for word."
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}))
        source = [str(folder / f"{name}.jsonl")]
        build_index(source, world.anchor / "tokenizer.json", folder / name)
    return [folder / "math", folder / "code"]


@pytest.mark.parametrize(
    ("chosen", "owners"),
    [
        ({}, {"math": 1, "code": 1}),
        ({"without": ["math"]}, {"code": 1}),
        ({"only": ["public", "math"]}, {"math": 1}),
    ],
)
def test_only_owners_whose_experts_are_on_are_asked(world, folders, chosen, owners):
    model, indexes = fo.load(world.merged), [Index.open(folder) for folder in folders]
    found = model.trace("word for word", indexes, **chosen)
    [span] = found.spans
    assert span.counts == owners and set(found.asked) == set(owners)
    assert {passage.owner for passage in span.passages} == set(owners)
    assert {passage.document for passage in span.passages} == {f"{o}.jsonl:1" for o in owners}


def test_an_index_whose_owner_could_not_be_switched_off_is_refused(world, folders, tmp_path):
    model = fo.load(world.merged)
    source, tokenizer = [str(folders[0].with_suffix(".jsonl"))], world.anchor / "tokenizer.json"
    build_index(source, tokenizer, tmp_path / "own", owner="Math Ltd")
    with pytest.raises(ValueError, match="'Math Ltd'; expected one of public, math, code"):
        model.trace("word for word", [Index.open(tmp_path / "own")])
    with pytest.raises(ValueError, match="nothing is left to search"):
        model.trace("word for word", [Index.open(folders[0])], without=["math"])
    with pytest.raises(ValueError, match="at least one"):
        model.trace("word for word", [])
    with pytest.raises(ValueError, match="no expert named 'maths'"):
        model.trace("word for word", [Index.open(folders[0])], without=["maths"])


def test_the_command_generates_and_traces(world, folders, flexolmo, refused, tmp_path):
    model = fo.load(world.merged)
    words = ("trace", "find", "--model", world.merged, "--prompt", "The", "--index", *folders)
    code, out, _ = flexolmo(*words, "--json", "--max-new-tokens", 8, "--page", tmp_path / "a.html")
    assert code == 0 and json.loads(out)["text"] == model.generate(["The"], 8)[0]
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    code, out, _ = flexolmo(*words, "--json", "--max-new-tokens", 8, "--without", "math")
    said = json.loads(out)
    assert said["text"] == model.generate(["The"], 8, without=["math"])[0]
    assert said["asked"] == ["code"] and "math" not in json.dumps(said["spans"])
    assert "no expert named" in refused(*words, "--without", "maths")
