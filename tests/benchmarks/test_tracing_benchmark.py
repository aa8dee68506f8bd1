"""The benchmark of tracing: the page shows what was measured, and its bars are judged rightly."""

import json
from pathlib import Path

import pytest

from benchmarks.tracing import SIZES, verdicts
from benchmarks.tracing_page import table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def result():
    return json.loads((ROOT / "docs/results/tracing.json").read_text())


def test_the_page_shows_what_was_measured(result):
    page = (ROOT / "docs/tracing.md").read_text()
    shown = page.partition("<!-- speed -->\n")[2].partition("\n<!-- end of speed -->")[0]
    assert table(result) in shown


def test_bars_are_met_or_missed(result):
    row = result["growth"][SIZES.index(1)]
    row |= {"spans_ms": {"p50": 4.01}, "first_touch_ms": 500.0, "index_seconds": 12.1}
    result["infini-gram"]["times_faster_than_infini_gram"] = 15.0
    said = dict(line.split(" ", 1) for line in verdicts(result))
    met = {name: text.endswith(": met") for name, text in said.items()}
    assert met == {
        "spans_ms": False,
        "times_faster_than_infini_gram": True,
        "first_touch_ms": True,
        "index_seconds": False,
    }
