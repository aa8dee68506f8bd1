"""Tables, parts of pages, figures and commands that all studies share."""

import numpy as np
import pytest

from flexolmo_jax.studies.engine.commands import run_command
from flexolmo_jax.studies.engine.plots import change_map, heat_map
from flexolmo_jax.studies.engine.report import link, table, write_page, write_part


def test_the_last_letter_aligns_all_further_columns():
    assert table(["a", "b", "c"], [[1, "x", 2.5]]) == [
        "| a | b | c |", "| --- | ---: | ---: |", "| 1 | x | 2.5 |",
    ]  # fmt: skip
    assert table(["a", "b", "c"], [], "lrl")[1] == "| --- | ---: | --- |"


def test_a_part_of_a_page_is_replaced_and_the_rest_stays(tmp_path, capsys):
    page = tmp_path / "page.md"
    write_page(page, ["before", "<!-- part -->", "old", "<!-- end of part -->", "after"])
    write_part(page, "part", ["new", "lines"])
    write_part(page, "part", ["new", "lines"])
    assert page.read_text() == "before\n<!-- part -->\nnew\nlines\n<!-- end of part -->\nafter\n"
    with pytest.raises(ValueError, match="expected the lines <!-- other -->"):
        write_part(page, "other", [])
    write_part(None, "part", ["only printed"])
    assert "only printed" in capsys.readouterr().out


def test_a_page_links_a_figure_from_its_own_folder(tmp_path):
    figure = tmp_path / "results" / "figure.png"
    assert link(figure, tmp_path / "page.md") == "results/figure.png"
    assert link(figure, None) == str(figure)


def test_figures_are_written(tmp_path):
    scores = {"anchor": {"math": 4.0, "code": 3.0}, "merged": {"math": 3.0, "code": 3.1}}
    heat_map(scores, tmp_path / "heat.png", baseline="anchor")
    change_map(["a"], ["b", "c"], np.array([[0.1, -0.3]]), tmp_path / "map.png", label="change")
    assert all((tmp_path / name).stat().st_size > 3000 for name in ("heat.png", "map.png"))


def test_a_failed_command_is_reported_with_what_it_said():
    with pytest.raises(RuntimeError, match="flexolmo inspect nowhere failed: .*nowhere"):
        run_command(["inspect", "nowhere"], quiet=True)
