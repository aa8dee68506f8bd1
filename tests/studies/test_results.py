"""The pages in docs/ are what the studies make of the results that were recorded."""

import json
import shutil

import pytest

from flexolmo_jax.studies import privacy_audits, scaling
from flexolmo_jax.studies.engine.report import RESULTS, link
from flexolmo_jax.studies.privacy_curve_page import draw, make_part
from flexolmo_jax.studies.scaling_page import make_page

DOCS = RESULTS.parent


def recorded(name):
    return json.loads((RESULTS / name).read_text())


def part(mark):
    """What stands between two marks of docs/privacy.md."""
    text = (DOCS / "privacy.md").read_text()
    return text.partition(f"<!-- {mark} -->\n")[2].partition(f"\n<!-- end of {mark} -->")[0]


def table_rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_papers_claims(study, tmp_path):
    shutil.copytree(RESULTS / "paper" / "study_full", tmp_path / "study")
    scores = json.loads((tmp_path / "study" / "tasks.json").read_text())
    for number, name in enumerate(("anchor", "merged")):
        results = {"results": {task: pair[number] for task, pair in scores.items()}}
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    tasks = ("--tasks", tmp_path / "anchor.json", tmp_path / "merged.json")
    where = ("--page", tmp_path / "page.md", "--results", tmp_path / "results" / "paper")
    study("reproduction", tmp_path / "study", *tasks, *where)
    assert (tmp_path / "page.md").read_text() == (DOCS / "reproduction_paper.md").read_text()


def test_the_papers_claims_with_heads(study, tmp_path):
    copied = RESULTS / "study_full"
    where = ("--page", tmp_path / "page.md", "--results", tmp_path / "results")
    study("reproduction", copied, *where)
    found, expected = tmp_path / "page.md", DOCS / "reproduction.md"
    assert table_rows(found.read_text()) == table_rows(expected.read_text())


@pytest.mark.parametrize("size", ["ci", "large"])
def test_the_privacy_curve(size, tmp_path):
    curve = recorded(f"privacy_curve_{size}.json")
    figure = link(RESULTS / f"privacy_curve_{size}.png", DOCS / "privacy.md")
    assert "\n".join(make_part(curve, size, figure)) == part(f"curve {size}")
    draw(curve, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_privacy_audits():
    for mark, lines in privacy_audits.make_parts(recorded("privacy_audits.json")).items():
        assert "\n".join(lines) == part(mark)


def test_plans_of_the_full_size():
    plans, checks = recorded("scaling.json"), recorded("scaling_checks.json")
    page = make_page(plans, checks, RESULTS, DOCS / "scaling.md")
    assert table_rows("\n".join(page)) == table_rows((DOCS / "scaling.md").read_text())
    jobs = scaling.jobs()
    assert list(plans) == list(jobs)
    assert all(plans[name]["set"] == job.values for name, job in jobs.items())


def test_equal_plans_are_made_once_and_others_are_kept(study, tmp_path, monkeypatch):
    plans = recorded("scaling.json")
    again = "2x7B expert, pair on v5p:4x4x4"  # the same job as "growth of chips: v5p:4x4x4"
    made = []
    monkeypatch.setattr(scaling, "make_in_a_process", lambda job: made.append(job) or plans[again])
    shutil.copy(RESULTS / "scaling.json", tmp_path)
    where = ("--page", tmp_path / "scaling.md", "--results", tmp_path)
    study("scaling", "--only", again, "growth of chips: v5p:4x4x4", *where)
    assert made == [scaling.jobs()[again]]
    assert json.loads((tmp_path / "scaling.json").read_text()) == plans
    assert (tmp_path / "scaling_chips.png").stat().st_size > 5000
    study("scaling", *where)
    assert len(made) == 1
