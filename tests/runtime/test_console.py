"""What people read on the screen."""

import pytest

from flexolmo_jax.runtime.console import console, show_fields, show_table, tell, visible


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
