"""Packages of format 1, as version 0.1.0 wrote them before format 2, still load and merge.

`format1/` holds an anchor, an expert and their merge; `expected.json` what that version computed:
digests of the merged tensors, the first logits of the last token, generated ids.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hostile.sealing import manifest_of, seal

import flexolmo_jax as fo
from flexolmo_jax.federation.fields import upgrade
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.storage.tensors import describe, named

FORMAT_1 = Path(__file__).parent / "format1"
EXPECTED = json.loads((FORMAT_1 / "expected.json").read_text())


@pytest.fixture
def old(tmp_path):
    shutil.copytree(FORMAT_1, tmp_path / "old")
    return tmp_path / "old"


def check(model):
    found = describe(named((model.backbone, model.experts)))
    assert {name: entry["sha256"] for name, entry in found.items()} == EXPECTED["tensors"]
    for key, without in (("logits", []), ("without_math", ["math"])):
        logits = model.logits(EXPECTED["tokens"], without=without)[:, -1, :8]
        np.testing.assert_allclose(logits, EXPECTED[key], atol=1e-5)
    prompt = model.tokenizer.encode_prompt(EXPECTED["prompt"])
    assert model.generate([prompt], max_new_tokens=8) == [EXPECTED["ids"]]


def test_the_files_are_of_format_1():
    for name in ("anchor", "math", "merged"):
        assert manifest_of(FORMAT_1 / name)["format"] == 1
    assert manifest_of(FORMAT_1 / "anchor")["model"]["remat"] == "products"
    assert manifest_of(FORMAT_1 / "math")["gating"] == "alone"


def test_a_merged_model_of_format_1_loads_and_generates():
    check(fo.load(FORMAT_1 / "merged"))


def test_packages_of_format_1_merge(old):
    fo.merge(old / "anchor", [old / "math"], old / "new", allow_share=None)
    check(fo.load(old / "new"))


def test_a_model_of_format_1_is_written_in_format_2_when_it_changes(old):
    fo.remove_expert(old / "merged", "math")
    assert manifest_of(old / "merged")["format"] == 2
    fo.add_expert(old / "merged", old / "math", allow_share=None)
    check(fo.load(old / "merged"))


def test_values_of_format_1_are_read_in_the_words_of_format_2(old):
    assert read_manifest(old / "anchor")["model"]["remat"] == "matmuls"
    math = read_manifest(old / "math")
    assert (math["format"], math["gating"]) == (2, "fixed")
    assert math["digest"] == manifest_of(old / "math")["digest"]  # of the bytes as they are
    seal(old / "math", gating="pair")
    assert read_manifest(old / "math")["gating"] == "softmax"


def test_a_manifest_of_format_1_is_checked_before_it_is_upgraded(old):
    file = old / "math" / "manifest.json"
    file.write_text(file.read_text().replace('"alone"', '"pair"'))
    with pytest.raises(ValueError, match="the manifest was changed after it was written"):
        read_manifest(old / "math")


@pytest.mark.parametrize("fields", [{}, {"gating": ["alone"]}, {"model": 3}, {"model": {}}])
def test_fields_that_cannot_be_upgraded_are_left_to_the_check(fields):
    assert upgrade({"format": 1, **fields}) == {"format": 2, **fields}
    for other in (True, 2, "1", None):
        assert upgrade({"format": other, **fields}) == {"format": other, **fields}
