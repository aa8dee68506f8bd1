"""`flexolmo admit`: verdicts, exit codes, reports and quarantine."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from hostile.sealing import array_of, put, seal

from flexolmo_jax.admission.admit import examine
from flexolmo_jax.admission.policy import Spectral
from flexolmo_jax.federation.package import NO_PRIVACY


@pytest.fixture(scope="module")
def policy_file(world, admitted, tmp_path_factory):
    """Five packages are a cohort; old5 is not among them."""
    file = tmp_path_factory.mktemp("policy") / "policy.toml"
    file.write_text(
        f"cohort = {json.dumps([str(path) for path in admitted[:5]])}\n"
        f'[domains]\nold0 = "{world.texts["code"]}"\n[loss]\nbytes = 4000\n'
    )
    return file


@pytest.fixture(scope="module")
def words(world, policy_file):
    return (
        "--anchor", world.anchor, "--public", world.texts["public"], "--policy", policy_file
    )  # fmt: skip


def verdicts(report: dict) -> dict[str, str]:
    return {x["measured"]: x["verdict"] for x in report["results"]}


def test_an_honest_package_is_admitted_and_the_report_says_so(
    flexolmo, words, honest, write, tmp_path
):
    hostile = "<script>alert(1)</script>\u202e"
    package = write(tmp_path / "mine", honest(70), licence=hostile)
    code, printed, error = flexolmo("admit", package, *words, "--out", tmp_path / "report")
    assert code == 0, printed + error
    assert "mine may be admitted" in printed
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "\u202e" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count('src="data:image/png;base64,') >= 4
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["verdict"] == "admitted" and report["facts"]["privacy"] == NO_PRIVACY
    assert report["cohort"] == [f"old{number}" for number in range(5)]
    found = verdicts(report)
    assert found.pop("public text, by evidence") == found.pop("domains, by evidence")
    assert found.pop("forbidden over allowed, nats") == "not judged"  # the policy has no probes
    assert set(found.values()) == {"passed"} and len(found) == 10
    assert report["seconds"].keys() >= {"integrity", "spectral", "routing", "loss", "probes"}


def test_the_table_fits_80_columns(flexolmo, words, admitted, monkeypatch):
    monkeypatch.setattr("flexolmo_jax.runtime.console.console.width", 80)
    code, printed, _ = flexolmo("admit", admitted[5], *words)
    assert code == 0
    [row] = [line for line in printed.splitlines() if "public text, by router row" in line]
    assert "passed" in row and len(row) <= 80  # a table, and not one field a line


def test_a_nan_is_rejected_and_nothing_else_is_measured(flexolmo, words, honest, write, tmp_path):
    package = write(tmp_path / "mine", honest(71))
    gate = array_of(package, "feed_forward.gate")
    gate[1, 0, 2, 3] = np.nan
    put(package, "feed_forward.gate", gate)
    code, printed, error = flexolmo("admit", package, *words, "--json")
    assert code == 4, error
    [result] = json.loads(printed)["results"]
    assert result["verdict"] == "reject" and "feed_forward.gate" in result["explanation"]


@pytest.mark.parametrize("damage", ["bit", "extra", "anchor", "kind", "none"])
def test_a_package_that_is_not_sound_is_a_finding_and_no_error(
    damage, world, policy, honest, write, tmp_path
):
    package = write(tmp_path / "mine", honest(72))
    if damage == "bit":
        file = package / "params/state/router.row/c/0/0/0"
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data)
    elif damage == "extra":
        (package / "more").symlink_to("/etc/passwd")
    elif damage == "anchor":
        seal(package, anchor="0" * 64)
    elif damage == "kind":
        package = world.anchor
    else:
        (package / "manifest.json").unlink()
    report = examine(package, world.anchor, str(world.texts["public"]), policy)
    assert report.verdict == "rejected" and len(report.results) == 1


def test_a_scaled_expert_needs_review_and_harms(flexolmo, words, anchor, honest, write, tmp_path):
    expert = honest(73)
    public = anchor.weights.public.feed_forward
    expert.feed_forward = jax.tree.map(lambda x, p: p + 4 * (x - p), expert.feed_forward, public)
    code, printed, _ = flexolmo("admit", write(tmp_path / "mine", expert), *words, "--json")
    report = json.loads(printed)
    assert (code, report["verdict"]) == (3, "review")
    assert verdicts(report)["matrices out of the cohort"] == "review"


def test_a_rejected_package_is_moved_with_its_report(
    flexolmo, words, admitted, honest, write, tmp_path
):
    """A copy of an admitted package; one that is admitted stays."""
    copy = write(tmp_path / "incoming" / "mine", honest(2), "mine")
    aside = tmp_path / "quarantine"
    code, printed, error = flexolmo("admit", copy, *words, "--quarantine", aside)
    assert code == 4, error
    [place] = aside.iterdir()
    assert f"moved {copy}" in printed.replace("\n", "") and not copy.exists()
    assert (place / "package" / "manifest.json").is_file()
    report = json.loads((place / "report" / "report.json").read_text())
    assert report["facts"]["name"] == "mine"
    [result] = [x for x in report["results"] if x["verdict"] == "reject"]
    assert result["check"] == "identity" and "old2" in result["explanation"]
    fine = shutil.copytree(admitted[5], tmp_path / "incoming" / "old5")
    assert flexolmo("admit", fine, *words, "--quarantine", aside)[0] == 0
    assert fine.is_dir() and len(list(aside.iterdir())) == 1


def test_a_name_that_is_taken_is_rejected_without_a_model(world, policy, honest, write, tmp_path):
    package = write(tmp_path / "mine", honest(74), "old1")
    report = examine(package, world.anchor, str(world.texts["public"]), policy)
    found = {(x.check, x.measured): x.verdict for x in report.results}
    assert report.verdict == "rejected" and found["identity", "name"] == "reject"
    assert found["loss", "behaviour"] == found["probes", "behaviour"] == "not judged"


def test_a_merged_model_is_a_cohort(world, policy, make_expert, tmp_path):
    package = make_expert(tmp_path / "mine", "mine", seed=75)
    few = dataclasses.replace(
        policy, cohort=(str(world.merged),), domains={}, spectral=Spectral(fails="reject")
    )
    report = examine(package, world.anchor, str(world.texts["public"]), few)
    assert report.cohort == ("math", "code")
    assert {x.verdict for x in report.results if x.check == "spectral"} == {"not judged"}


def test_what_cannot_be_examined_is_an_error(refused, words, world, admitted, tmp_path):
    assert "no such folder" in refused("admit", tmp_path / "none", *words)
    assert "is in the policy's cohort already" in refused("admit", admitted[0], *words)
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").touch()
    assert "already there" in refused("admit", admitted[5], *words, "--out", here)
    link = tmp_path / "link"
    link.symlink_to(admitted[5])
    assert "is a link" in refused("admit", link, *words, "--quarantine", tmp_path / "q")
    *others, policy = words
    for text, message in {
        'always_on = ["public", "old9"]': "no expert named 'old9'",
        'cohort = ["missing"]': "missing: no such folder",
        f'cohort = ["{world.anchor}"]': "an anchor; the cohort is expert packages",
        f'cohort = ["{world.experts["math"]}", "{world.merged}"]': "named 'math'",
        '[domains]\nmath = "missing.jsonl"': "missing.jsonl",
        '[probes]\nfile = "missing.jsonl"': "missing.jsonl",
    }.items():
        file = tmp_path / "policy.toml"
        file.write_text(text)
        assert message in refused("admit", admitted[5], *others, file), text
