"""The month's report: its numbers, and how far mass and counterfactual agree."""

import json

import numpy as np
import pytest

from flexolmo_jax.usage import agreement, entries, ledger, report
from flexolmo_jax.usage.agreement import Answer


def line(day, mass, tokens=10, bits=None, month="2026-11"):
    made = entries.use("m", 3, tokens, mass)
    if bits is not None:
        made = entries.sample("m", tokens, mass, bits)
    return {**made, "time": f"{month}-{day:02}T05:00+00:00"}


LINES = [
    line(1, {"public": 4.0, "math": 6.0}),
    line(1, {"public": 20.0}, tokens=20),
    line(3, {"math": 9.5, "code": 0.5}),
    line(3, {"math": 9.5, "code": 0.5}, bits={"math": 0.8, "code": -0.1}),
]


def test_the_numbers_of_a_month_are_those_of_its_uses():
    made = report.make_report("2026-11", LINES)
    assert (made.requests, made.tokens) == (3, 40)
    assert list(made.owners) == ["public", "math", "code"]
    math = made.owners["math"]
    assert (math.requests, math.tokens, math.mass, math.sampled) == (2, 20, 15.5, 1)
    assert abs(math.share - 15.5 / 40) < 1e-9 and math.bits == 0.8
    assert made.owners["public"].bits is None
    assert made.days == {
        "2026-11-01": {"public": 24.0, "math": 6.0}, "2026-11-03": {"math": 9.5, "code": 0.5},
    }  # fmt: skip
    assert made.agreement is None and "1 answer was sampled: too few" in report.sentences(made)[1]


def test_a_month_is_chosen_and_the_last_is_the_default(kept, monkeypatch):
    for month in ("2026-10", "2026-11", "2026-10", "2026-11"):  # the clock was set back, too
        monkeypatch.setattr(ledger.entries, "hour", lambda month=month: f"{month}-02T03:00+00:00")
        kept.add(entries.use("m", 3, int(month[-2:]), {"math": 1.5}))
    assert report.read_report(kept.file).tokens == 22
    assert report.read_report(kept.file, "2026-10").tokens == 20
    with pytest.raises(ValueError, match="no request in 2026-09"):
        report.read_report(kept.file, "2026-09")


def test_rank_correlation_is_that_of_the_ranks():
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 6, 40), draw.integers(0, 6, 40)

    def slow_ranks(values):
        return [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]

    expected = np.corrcoef(slow_ranks(x), slow_ranks(y))[0, 1]
    assert abs(agreement.spearman(x, y) - expected) < 1e-12
    assert agreement.spearman(x, x**3) == pytest.approx(1)
    assert np.isnan(agreement.spearman(x, np.ones(40)))


def answers(follow: bool, count=40):
    draw = np.random.default_rng(1)
    for _ in range(count):
        mass = dict(zip("abc", draw.uniform(1, 9, 3), strict=True))
        bits = {n: x / 9 if follow else draw.uniform(-1, 1) for n, x in mass.items()}
        yield Answer(mass, bits)


def test_agreement_is_found_where_it_is():
    alike = agreement.agreement(list(answers(True)))
    assert alike.rank_correlation.low > 0.7 and alike.same_first.value == 1
    assert alike.negative == (0, 0, 0)
    apart = agreement.agreement(list(answers(False)))
    assert apart.rank_correlation.low < 0 < apart.rank_correlation.high
    assert 0.2 < apart.negative.low < apart.negative.high < 0.8
    assert agreement.agreement(list(answers(True, 9))) is None


def test_what_is_all_the_same_agrees_with_nothing():
    same = [Answer({"a": 2.0, "b": 2.0}, {"a": n, "b": -n}) for n in range(20)]
    assert agreement.agreement(same) is None


def test_the_command_reports_in_80_columns(filled, flexolmo, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "FEWEST", 2)
    code, printed, error = flexolmo("usage", "report", filled.file, "--out", tmp_path / "out")
    assert code == 0, error
    assert max(map(len, printed.splitlines())) <= 80 and "rank correlation" in printed
    assert (tmp_path / "out" / "month.png").stat().st_size > 3000
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    code, printed, _ = flexolmo("usage", "report", filled.file, "--json")
    assert json.loads(printed) == made and made["requests"] == 18
    assert abs(sum(own["share"] for own in made["owners"].values()) - 1) < 1e-9
    assert "already there" in refused("usage", "report", filled.file, "--out", tmp_path / "out")
    assert "expected YYYY-MM" in refused("usage", "report", filled.file, "--month", "2026-13")
    assert "no request in 1999-01" in refused("usage", "report", filled.file, "--month", "1999-01")
    assert "No such file" in refused("usage", "report", tmp_path / "none")
    filled.file.write_bytes(filled.file.read_bytes().replace(b'"tokens": 1', b'"tokens": 2', 1))
    assert "chain is broken" in refused("usage", "report", filled.file)
