"""A private expert and its non-private baseline: the whole self-test, on a small world."""

import json

import pytest

from flexolmo_jax.audits import control
from flexolmo_jax.studies.selftest import Trial, check_twin, run_twin


@pytest.fixture(scope="module")
def trial(world, tmp_path_factory):
    few = tmp_path_factory.mktemp("few") / "few.jsonl"
    few.write_text("".join(world.texts["math"].read_text().splitlines(keepends=True)[:20]))
    config = world.config_file("alone")
    private = (config, "--dp-windows", "8", "--data.batch-size", "64", "--steps", "8")
    baseline = (
        config, "--steps", "800", "--data.batch-size", "16", "--optimizer.learning-rate", "3e-3",
        "--checkpoint-every", "800", "--log-every", "100",
    )  # fmt: skip
    return Trial(str(few), 0.1, canaries=130, prefixes=16, private=private, baseline=baseline)


def test_the_two_reports_differ_as_they_should(learned_anchor, trial, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(control, "DOCUMENTS", 2)  # as many as so small an expert can hold
    monkeypatch.setattr(control, "MORE", 8)
    report = run_twin(tmp_path / "out", learned_anchor, 4.0, trial)
    assert all(report["checks"].values()), report["checks"]
    check_twin(report)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    private, baseline = (report[name]["membership"] for name in ("private", "baseline"))
    assert private["certificate"]["epsilon"] <= 4 and baseline["certificate"] is None
    assert private["commitment"] != baseline["commitment"]
    printed = capfd.readouterr().out
    assert (
        "noise multiplier" in printed and "canaries distinguished" in printed
    )  # the certificate too


def test_two_that_do_not_differ_are_told():
    report = {"checks": {"the baseline's canaries are distinguished": False, "another": True}}
    with pytest.raises(ValueError, match="failed checks: the baseline's canaries are distinguish"):
        check_twin(report)


def test_wrong_input_is_refused_before_any_work(tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert "already there" in refused("audit", "twin", "--out", tmp_path / "out")
    assert "epsilon must be positive" in refused(
        "audit", "twin", "--out", tmp_path / "new", "--dp-epsilon", 0
    )
    assert not (tmp_path / "new").exists()
