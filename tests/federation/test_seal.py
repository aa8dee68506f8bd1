"""Packages of strangers: what is no plain file, number or name, or not their anchor, is refused."""

import json
import os
import shutil
import time

import jax
import numpy as np
import pytest
from hostile.sealing import array_of, data_file, manifest_of, put, seal

import flexolmo_jax as fo
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merged import check_package


@pytest.fixture
def refused_by_all(copied, tmp_path):
    """refused_by_all(match): merge, add, load and inspect refuse the package `math`, alike."""
    fo.merge(copied.anchor, [copied.experts["code"]], tmp_path / "others")
    package = copied.experts["math"]

    def check(match: str) -> None:
        for attempt in (
            lambda: fo.merge(copied.anchor, [package], tmp_path / "new"),
            lambda: fo.add_expert(tmp_path / "others", package),
            lambda: fo.load(package),
            lambda: check_package(package),
        ):
            with pytest.raises(ValueError, match=match) as error:
                attempt()
            assert "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()
        assert fo.load(tmp_path / "others").expert_names == ("public", "code")

    return check


def test_a_hugging_face_model_inside_a_package_is_not_taken_for_it(copied, refused_by_all):
    """Its weights are in no digest."""
    folders = (copied.experts["math"], copied.anchor, copied.merged)
    for folder in folders:
        (folder / "config.json").write_text('{"model_type": "olmo2"}')
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="config.json: unexpected file; delete it"):
            fo.load(folder)
        if folder == copied.experts["math"]:
            refused_by_all("config.json: unexpected file; delete it")


@pytest.mark.parametrize(
    "part",
    ["params", "params/state", "params/state/router.row", "params/state/router.row/c",
     "params/state/router.row/zarr.json", "params/orbax.checkpoint", "manifest.json"],
)  # fmt: skip
def test_a_link_in_a_package_is_refused(copied, refused_by_all, tmp_path, part):
    path = copied.experts["math"] / part
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused_by_all(f"{path.name}: a link, where only regular files may be")


@pytest.mark.parametrize("where", ["pipe", "params/state/router.row/pipe", "manifest.json"])
def test_a_named_pipe_is_refused_at_once(copied, refused_by_all, where):
    path = copied.experts["math"] / where
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refused_by_all("a named pipe, where only regular files may be")


@pytest.mark.parametrize("name", [".x.partial", "x.partial", f".manifest.json.{'0' * 32}.partial"])
def test_what_a_killed_write_left_is_no_part_of_a_package(copied, refused_by_all, name):
    (copied.experts["math"] / name).write_text("x")
    refused_by_all("unexpected file; delete it")
    seal(copied.experts["math"])
    refused_by_all("field 'files'")


def test_a_manifest_with_other_line_ends_is_refused(copied, refused_by_all):
    file = copied.experts["math"] / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    refused_by_all("the manifest was changed")


@pytest.mark.parametrize("tensor", ["router.row", "router.bias", "feed_forward.down"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_weights_that_are_no_numbers_are_refused_by_name(copied, refused_by_all, tensor, value):
    package = copied.experts["math"]
    array = array_of(package, tensor)
    array.reshape(-1)[-1] = value
    put(package, tensor, array)
    refused_by_all(rf"\(tensor {tensor}\): weights that are NaN, infinite")


def test_weights_that_are_no_numbers_are_not_written(world, tmp_path):
    anchor = read_anchor(world.anchor)
    expert = jax.tree.map(lambda x: x * np.nan, anchor.weights.public)
    with pytest.raises(ValueError, match="NaN, infinite"):
        write_expert(tmp_path / "out", expert, "mine", anchor, {})
    assert not list(tmp_path.iterdir())


def test_an_anchor_with_a_weight_that_is_no_number_is_refused(copied):
    row = array_of(copied.anchor, "public.router.row")
    put(copied.anchor, "public.router.row", row * np.nan)
    with pytest.raises(ValueError):
        fo.load(copied.anchor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [2, 1, 10**9]}, "expected a tensor router.row of shape"),
        ({"shape": "2"}, "field 'tensors'"),
        ({"dtype": "float64"}, "field 'tensors'"),
        ({"dtype": "bfloat16"}, "expected bfloat16 in one uncompressed file"),
        ({"sha256": "0" * 64}, "not the tensor of the manifest"),
        (None, "expected a tensor router.row of shape .*, found it missing"),
    ],
)
def test_a_tensor_that_load_refuses_is_refused_by_all(copied, refused_by_all, changes, message):
    tensors = manifest_of(copied.experts["math"])["tensors"]
    if changes is None:
        del tensors["router.row"]
    else:
        tensors["router.row"] |= changes
    seal(copied.experts["math"], contents=False, tensors=tensors)
    refused_by_all(message)


def test_a_tensor_that_was_cut_is_refused_by_all(copied, refused_by_all):
    data_file(copied.experts["math"], "router.row").write_bytes(b"abc")
    seal(copied.experts["math"])
    refused_by_all("router.row: expected 256 bytes and 20 of an index, found 3 in all")


# The anchor.


def test_an_altered_anchor_under_a_merged_model_is_refused(copied):
    head = array_of(copied.anchor, "backbone.head")
    before = manifest_of(copied.anchor)["tensors"]
    put(copied.anchor, "backbone.head", head[:, ::-1])
    for match in (
        "its config, tokenizer and tensors make the anchor",
        "not the tensor|another manifest",
    ):
        for attempt in (
            lambda: fo.load(copied.merged),
            lambda: check_package(copied.merged),
            lambda: fo.load(copied.experts["math"]),
            lambda: read_anchor(copied.anchor, on_disk=True),  # as training beside it does
        ):
            with pytest.raises(ValueError, match=match):
                attempt()
        seal(copied.anchor, contents=False, tensors=before)


@pytest.mark.parametrize("part", ["public.jsonl", "separator", "max_length", "licence"])
def test_nothing_of_the_anchor_of_a_merged_model_may_change(copied, part):
    manifest = manifest_of(copied.anchor)
    if part == "public.jsonl":
        (copied.anchor / part).write_text('{"text": "other text"}\n')
        seal(copied.anchor)
    elif part == "separator":
        tokenizer = {**manifest["tokenizer"], "separator": "a"}
        seal(copied.anchor, contents=False, tokenizer=tokenizer)
    elif part == "max_length":
        seal(copied.anchor, contents=False, model={**manifest["model"], part: 32})
    else:
        seal(copied.anchor, contents=False, licence="CC0-1.0")
    with pytest.raises(ValueError, match="not the anchor that was merged: it has the same weights"):
        fo.load(copied.merged)


def test_a_merged_model_of_an_older_version_pins_the_identity_alone(copied):
    anchor = manifest_of(copied.merged)["anchor"]
    del anchor["digest"]
    seal(copied.merged, contents=False, anchor=anchor)
    seal(copied.anchor, contents=False, licence="CC0-1.0")
    assert fo.load(copied.merged).expert_names == ("public", "math", "code")
    fo.remove_expert(copied.merged, "code")
    fo.add_expert(copied.merged, copied.experts["code"])
    assert manifest_of(copied.merged)["anchor"]["digest"] == manifest_of(copied.anchor)["digest"]


# Names and fields.


@pytest.mark.parametrize(
    "name",
    ["public", "Public", "pub1ic", "", "code\nmath", "\x1b[31mred", "m\u0430th", "a b", None, 3,
     ["math"]],
)  # fmt: skip
def test_a_name_that_cannot_be_one_is_refused_on_reading(copied, refused_by_all, name):
    seal(copied.experts["math"], contents=False, name=name)
    refused_by_all("cannot be an expert's name|field 'name'")


@pytest.mark.parametrize(("one", "other"), [("math", "Math"), ("v1", "vl"), ("corn", "com")])
def test_names_that_look_alike_are_refused(world, tmp_path, make_expert, one, other):
    packages = [make_expert(tmp_path / str(n), name) for n, name in enumerate((one, other))]
    with pytest.raises(ValueError, match="which look alike"):
        fo.merge(world.anchor, packages, tmp_path / "merged")


def test_a_package_given_twice_is_refused(world, tmp_path):
    one = world.experts["math"]
    with pytest.raises(ValueError, match="given twice"):
        fo.merge(world.anchor, [one, one.parent / ".." / "experts" / "math"], tmp_path / "merged")


def test_a_label_that_is_not_the_packages_own_name_is_refused(copied):
    experts = manifest_of(copied.merged)["experts"]
    experts[0]["name"], experts[1]["name"] = experts[1]["name"], experts[0]["name"]
    seal(copied.merged, contents=False, experts=experts)
    for attempt in (fo.load, check_package):
        with pytest.raises(ValueError, match="merged as 'code' .its name is 'math'"):
            attempt(copied.merged)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens_seen", "many"), ("tokens_seen", True), ("tokens_seen", 2**70), ("licence", 3),
        ("contact", "\x1b[2J"), ("contact", ["a"]), ("privacy", 3), ("model", []), ("anchor", ""),
        ("made_by", None), ("files", []), ("tensors", None), ("kind", []), ("format", True),
        ("more", json.loads("[" * 40 + "]" * 40)),
    ],
)  # fmt: skip
def test_a_field_of_another_type_ends_in_a_line_that_names_it(copied, refused_by_all, field, value):
    seal(copied.experts["math"], contents=False, **{field: value})
    refused_by_all(f"math/manifest.json: .*{field}")


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "9" * 10_000 + "}", "[" * 10**5,
     '{"a":' * 10**5, "[]", "3", "", "\ufeff{}"],
)  # fmt: skip
def test_odd_json_ends_in_a_line_that_names_the_file(copied, refused_by_all, text):
    (copied.experts["math"] / "manifest.json").write_text(text, encoding="utf-8")
    refused_by_all("math/manifest.json: (damaged, not a manifest|the manifest was changed)")


# The bytes of a package.


def test_equal_weights_give_equal_packages_whenever_they_are_written(
    tmp_path, make_expert, monkeypatch
):
    one = make_expert(tmp_path / "one", "mine", seed=7)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    monkeypatch.setattr(time, "time_ns", lambda: int((now + 1e6) * 1e9))
    other = make_expert(tmp_path / "other", "mine", seed=7)
    files = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert files == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
