"""The bench's arithmetic: figures, bounds, flagged, and the page that they make."""

import json
import math

import numpy as np
import pytest

from flexolmo_jax.admission.policy import Policy
from flexolmo_jax.studies.admission.attackers import ATTACKS
from flexolmo_jax.studies.admission.bench import (
    ALL,
    FIGURES,
    PAYLOAD,
    calibrated,
    checks_of,
    default_bounds,
    failed,
    false_positives,
    figures_of,
)
from flexolmo_jax.studies.admission.examined import exceeded
from flexolmo_jax.studies.admission.page import Bench, make_page

QUIET = {"cost": 0.0, "cost_of": "public", "share": 0.1, "share_of": "code", "credit": 0.1,
         "credit_of": "code", "payload": 0.0, "extracted": 0.0}  # fmt: skip


def rows_of(**values: float) -> list[dict]:
    """What an examination stores: every figure 0.01 but those given, by the bench's names."""
    sound = {"value": None, "verdict": "passed"}
    rows = [{"check": "integrity", "measured": "files", **sound}]
    rows.append({"check": "identity", "measured": "name", **sound})
    for (check, measured), name in FIGURES.items():
        value = values.get(name.replace(" ", "_").replace(",", ""), 0.01)
        row = {"check": check, "measured": measured, "value": value, "verdict": "passed"}
        rows.append({**row, "z": value, "value": 0.0} if check == "spectral" else row)
    return rows


def test_figures_are_read_by_name_and_what_fails_without_one_is_infinite():
    rows = rows_of(likeness=0.4, z_of_norms=3.0)
    found = figures_of(rows)
    assert found["likeness"] == 0.4
    assert found["z of norms"] == 3.0
    assert found["integrity"] == found["name"] == 0.0
    rows[0] |= {"verdict": "reject"}
    rows[2] |= {"verdict": "not judged", "value": None}
    rows[-5] |= {"value": None, "verdict": "reject"}  # a rise that is not a number
    found = figures_of(rows)
    assert found["integrity"] == math.inf
    assert "likeness" not in found
    assert sum(map(math.isinf, found.values())) == 2
    with pytest.raises(ValueError, match="unknown result"):
        figures_of([{"check": "loss", "measured": "weather", "value": 1, "verdict": "passed"}])


def test_a_share_of_the_figures_may_exceed_a_bound():
    assert exceeded([1, 9, 5, 3, 2, 2, 2, 2, 2, 2, 2, 2], 0.1) == 5  # one of twelve may be out
    assert exceeded([1, 9, 5], 0.0) == 9
    assert exceeded([7], 0.9) == 7
    assert exceeded([], 0.1) is None


def test_bounds_are_calibrated_on_honest_experts_and_alarms_are_of_others():
    given = {"likeness": 0.7, "known text": math.inf, "integrity": 0.0}
    honest = {
        str(i): {"likeness": 0.3 + 0.01 * i, "known text": float(i), "integrity": 0.0}
        for i in range(10)
    }
    bounds = calibrated(honest.values(), given)
    assert bounds["likeness"] == pytest.approx(0.39 + 0.5 * 0.045)
    assert bounds["known text"] == pytest.approx(9 + 0.5 * 4.5)
    assert bounds["integrity"] == 0
    assert not false_positives(honest, given, ALL)
    assert not false_positives(honest, given, ALL, folds=2)
    honest["3"] = {"likeness": 0.42}  # 0.412 is what all others set, 0.40 what the even ones set
    assert false_positives(honest, given) == ["3"]
    honest["3"] = {"likeness": 0.405}
    assert not false_positives(honest, given)
    assert false_positives(honest, given, folds=2) == ["3"]
    assert calibrated([{}], given) == given


def test_what_fails_is_named_by_check_and_probes_that_know_count_only_if_asked():
    bounds = default_bounds(Policy())
    figures = figures_of(rows_of(public_share_rows=0.9, rise_domain=0.2, known_trigger=5.0))
    assert figures.keys() <= bounds.keys()
    # probes' leads of 0.01 are above their margin of 0
    figures |= {"other payload": -1.0, "another phrase": 2.0, "no trigger": -1.0}
    assert failed(figures, bounds) == ["public share, rows", "rise, domain"]
    assert failed(figures, bounds, PAYLOAD)[-1] == "another phrase"
    assert checks_of(failed(figures, bounds, ALL)) == ["routing", "loss", "probes"]
    assert failed({"rise alone": math.nan}, bounds) == ["rise alone"]


@pytest.fixture(scope="module")
def report() -> dict:
    """Six honest experts, and all attackers, of which some are caught, and some are not."""
    quiet = {
        "other_payload": -9.0,
        "known_trigger": -9.0,
        "another_phrase": -9.0,
        "no_trigger": -9.0,
        "known_text": 1.0,
    }
    honest = {
        f"honest{i}": {"text": "news", "words": ["--seed", "1"], "made": None} for i in range(6)
    }
    examined = {
        name: rows_of(**quiet | {"likeness": 0.1 + 0.001 * i}) for i, name in enumerate(honest)
    }
    examined |= {name: rows_of(**quiet) for name in ATTACKS}
    examined["row_strong"] = rows_of(**quiet | {"public_share_rows": 1.0})
    examined["copy"] = rows_of(**quiet | {"likeness": 0.45})
    examined["backdoor"] = rows_of(**quiet | {"known_trigger": 40.0})
    examined["nan"] = [
        {"check": "integrity", "measured": "files", "value": None, "verdict": "reject"}
    ]
    harm = dict.fromkeys(examined, {"rows": QUIET})
    harm |= {"nan": {"refused": "a NaN"}, "row_strong": {"rows": {**QUIET, "cost": 10.0}},
             "copy": {"rows": {**QUIET, "credit": 0.5}},
             "backdoor": {"rows": QUIET, "evidence": {**QUIET, "payload": 1.0}}}  # fmt: skip
    attackers = {n: {"kind": a.kind, "level": a.level, "what": a.what} for n, a in ATTACKS.items()}
    made = {"machine": "2 cores, today", "minutes": 1, "honest": honest, "attackers": attackers,
            "examined": examined, "harm": harm}  # fmt: skip
    return json.loads(json.dumps(made))


def test_the_bench_says_who_is_caught_by_what(report):
    bench = Bench(report)
    assert set(bench.harmful) == {"row_strong", "copy", "backdoor", "nan"}
    assert bench.caught("row_strong", bench.default) == ["routing"]
    assert bench.caught("nan", bench.default) == ["integrity"]
    assert not bench.caught("copy", bench.default)
    assert bench.caught("copy", bench.calibrated) == ["identity"]
    assert not bench.caught("backdoor", bench.calibrated, PAYLOAD)
    assert bench.caught("backdoor", bench.default, ALL) == ["probes"]
    assert bench.flagged()["default"] == []
    assert np.isfinite(bench.calibrated["known text"])


def test_the_page_names_what_passes_and_has_a_figure(report, tmp_path):
    page = "\n".join(make_page(report, tmp_path, None))
    missed = next(line for line in page.splitlines() if "Not caught by the default" in line)
    assert "copied package" in missed
    assert "trigger after 30% of sentences" in missed
    assert "mean input" not in missed
    assert "knows all: none." in page
    assert (tmp_path / "admission.png").stat().st_size > 10_000
    assert "+1000% or more bits of public" in page
    assert "nan" not in page.replace("NaN", "").lower().replace("finance", "")
