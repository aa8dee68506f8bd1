"""The privacy studies on a small world: what is trained, merged and scored, and what is resumed."""

import dataclasses
import json
import math

import pytest

from flexolmo_jax.audits import control, extraction
from flexolmo_jax.data.sources import Document
from flexolmo_jax.model import load
from flexolmo_jax.studies import privacy_audits, privacy_curve
from flexolmo_jax.studies.engine.report import RESULTS
from flexolmo_jax.studies.engine.stages import DONE
from flexolmo_jax.studies.privacy_curve import Choice, Size

GRID = (Choice(4, 0.1, 2, 1e-3), Choice(4, 0.1, 4, 1e-3))
CERTIFICATE = {"delta": 1e-5, "units": 50, "noise_multiplier": 1.5}


@pytest.fixture
def small_curve(monkeypatch):
    size = Size(("math",), "code", "sequence", GRID, (0,), (8.0, math.inf), 1)
    text = "The sum of two and three is five, and that is all there is to say."
    monkeypatch.setitem(privacy_curve.SIZES, "smallest", size)
    monkeypatch.setattr(privacy_curve, "heldout_documents", lambda *_: [Document(text, text)])
    monkeypatch.setattr(privacy_curve, "read_manifest", lambda _: {"privacy": CERTIFICATE})
    return size


def test_the_curve_is_trained_once_and_shown_in_a_table(study, small_curve, no_training, tmp_path):
    printed = study("privacy-curve", tmp_path / "out", "--size", "smallest")
    assert "| epsilon 8 |" in printed and "| epsilon none |" in printed and "(chosen)" in printed
    assert sorted(words[1] for words in no_training) == ["anchor", *["expert"] * 4]
    private = [words for words in no_training if "--dp-epsilon" in words]
    assert [words[words.index("--name") + 1] for words in private] == ["code", "code", "math"]
    assert all("--dp-ledger" in words for words in private)
    units = [words[words.index("--dp-unit") + 1] for words in private]
    assert units == ["sequence", "sequence", "document"]
    curve = json.loads((tmp_path / "out" / "privacy_curve_smallest.json").read_text())
    asked = [point["epsilon"] for point in curve["points"]]
    assert asked == [None, {"math": "8"}, {"math": "none"}]
    count = len(no_training)
    assert study("privacy-curve", tmp_path / "out", "--size", "smallest") == printed
    assert len(no_training) == count  # all stages are done


def test_another_choice_trains_other_experts(small_curve, tmp_path):
    plan = privacy_curve.CurvePlan(tmp_path, small_curve, None)
    other = privacy_curve.CurvePlan(tmp_path, dataclasses.replace(small_curve, windows=2), None)
    assert plan.anchor(0).digest == other.anchor(0).digest
    expert, same = (p.expert(0, "math", math.inf, None) for p in (plan, other))
    assert expert.digest == same.digest
    private, changed = (p.expert(0, "math", 8.0, GRID[0]) for p in (plan, other))
    assert len({expert.digest, private.digest, changed.digest}) == 3


def test_a_corpus_goes_with_the_large_size_only(study, tmp_path):
    with pytest.raises(ValueError, match="--corpus goes with --size large"):
        study("privacy-curve", tmp_path, "--size", "large")


@pytest.fixture
def stub_audits(world, monkeypatch):
    """Audits that return what was recorded for the project's own models."""
    recorded = json.loads((RESULTS / "privacy_audits.json").read_text())
    asked = []

    def record(kind, title):
        asked.append((kind, title))
        return next(iter(recorded[kind].values()))

    monkeypatch.setattr(privacy_audits, "DATA", str(world.texts["math"]))
    monkeypatch.setattr(
        privacy_audits, "pick_proxies", lambda own, public, file: file.parent.mkdir(exist_ok=True)
    )
    monkeypatch.setattr(control, "train_control", lambda *_: load(world.anchor))
    monkeypatch.setattr(extraction, "extract", lambda *_, title, **__: record("extraction", title))
    monkeypatch.setattr(
        privacy_audits, "run_membership", lambda path, *_: record("membership", path)
    )
    monkeypatch.setattr(
        privacy_audits, "run_removal", lambda path, *_, **__: record("removal", path)
    )
    return asked


def test_every_model_is_audited_once(study, no_training, stub_audits, tmp_path):
    out = tmp_path / "out"
    printed = study("privacy-audits", out, "--size", "smallest")
    titles = [title for kind, title in stub_audits if kind == "extraction"]
    assert titles == [
        "anchor", "expert alone, no privacy", "merged, no privacy", "expert alone, epsilon 8",
        "merged, epsilon 8", "merged, math switched off", "control: expert", "control: model",
    ]  # fmt: skip
    kinds = [kind for kind, _ in stub_audits]
    assert kinds.count("membership") == 2 and kinds.count("removal") == 2
    assert all(f"| {title} |" in printed for title in titles)
    assert "| epsilon 8 | 7.99 |" in printed or "| epsilon 8 | none |" in printed
    stages = len(list(out.rglob(DONE)))
    stub_audits.clear()
    study("privacy-audits", out, "--size", "smallest")
    assert not stub_audits and len(list(out.rglob(DONE))) == stages
