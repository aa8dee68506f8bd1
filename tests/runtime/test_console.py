"""What people read on the screen."""

import itertools
import re

import pytest

from flexolmo_jax.runtime import console as screen
from flexolmo_jax.runtime.console import (
    console,
    print_json,
    progress,
    show_fields,
    show_table,
    tell,
    visible,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\tc\x9bd", r"a\x0db\x09c\x9bd"),
        ("right \u202eto left, \u200bno width", r"right \u202eto left, \u200bno width"),
        ("half a character \udcff", r"half a character \udcff"),
        ("line\u2028end", r"line\u2028end"),
        ("[bold red]Ω 漢字 :smile: 😀[/x]\nnext", "[bold red]Ω 漢字 :smile: 😀[/x]\nnext"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_spelled_out(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


@pytest.mark.parametrize("width", [80, 60])
def test_a_row_that_is_wider_than_the_screen_is_shown_in_full(capsys, monkeypatch, width):
    monkeypatch.setattr(console, "_width", width)
    row = {
        "name": "educational",
        "path": "/data/" + "a-long-folder/" * 12,
        "privacy": "epsilon 7.98765, delta 1e-05, unit group:patient",
        "tokens": 1234567,
        "contact": "[/x] \x1b[2J",
    }
    show_table([row, {**row, "name": "math"}], title="t" * 100)
    show_fields(row)
    tell(row["path"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out and "\x1b" not in out
    whole = "".join(c for c in out if c not in "│├┤┼─┌┐└┘┬┴ \n")
    assert whole.count(row["path"]) == 4
    for value in ("educational", "epsilon7.98765,delta1e-05", "1,234,567", r"[/x]\x1b[2J"):
        assert value in whole


def test_a_table_that_fits_is_a_table(capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 80)
    show_table([{"data": "math", "bytes": 12345}, {"data": "a[b]", "bytes": 7}])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert "a[b]" in lines[4] and "12,345" in lines[3] and "     7" in lines[4]


def test_in_a_log_progress_is_plain_lines_and_says_how_long_it_takes(monkeypatch, capsys):
    """Many at first, then one in about 30 seconds; the last step is always shown."""
    clock = 0.0
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock)
    with progress("expert mine", 10_000, unit="step") as bar:
        for step in range(1, 10_001):
            clock += 5.0 if step == 1 else 0.5
            bar.update(step, "loss 2.000", "1,000 tokens/s", "epsilon 0.50/8")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "expert mine: step 1/10000, loss 2.000, 1,000 tokens/s, epsilon 0.50/8"
    assert lines[1].endswith("tokens/s, epsilon 0.50/8, 1:23:19 left")
    assert lines[-1].startswith("expert mine: step 10000/10000, ") and "0:00:00 left" in lines[-1]
    told = [int(re.search(r"step (\d+)/", line)[1]) for line in lines]
    assert 150 < len(told) < 300
    assert max(b - a for a, b in itertools.pairwise(told)) == 60


def test_a_terminal_shows_progress_as_a_bar_whatever_the_titles_hold(monkeypatch, capsys):
    monkeypatch.setattr(screen.progress_console, "_force_terminal", True)
    monkeypatch.setattr(screen.progress_console, "is_interactive", True)
    monkeypatch.setattr(screen.progress_console, "_width", 120)
    with progress("expert [red]mine", 3, unit="step") as bar:
        bar.advance(2, "loss [/x] \x1b[2J", "")
        bar.advance(1, "loss 2.000", "", "epsilon 1")
    shown = capsys.readouterr().err
    assert "expert [red]mine" in shown and "step 3/3" in shown and "loss 2.000, epsilon 1" in shown
    assert "\x1b[2J" not in shown


def test_quiet_progress_prints_nothing(capsys):
    with progress("work", 2, quiet=True) as bar:
        bar.advance()
        bar.update(2, "a note")
    assert capsys.readouterr() == ("", "")


def test_a_process_that_is_not_the_main_one_shows_no_progress(monkeypatch, capsys):
    monkeypatch.setattr(screen.progress_console, "quiet", False)
    screen.silence_progress()
    screen.log("resuming")
    with progress("work", 2) as bar:
        bar.update(2)
    tell("a result")
    assert capsys.readouterr() == ("a result\n", "")


def test_json_of_a_number_that_json_lacks_is_refused(capsys):
    with pytest.raises(ValueError, match="NaN or infinite, so nothing is printed"):
        print_json({"loss": float("nan")})
    assert capsys.readouterr().out == ""
