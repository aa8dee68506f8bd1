"""What people read on the screen: one console, tables that fit it, and text of strangers.

Manifests come from people nobody knows. Their text may hold terminal escapes, which could clear the
screen or retitle the window, and brackets, which rich would take for markup. So the console parses
no markup, and whatever is printed by the functions here passes through `visible`.
"""

import contextlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(markup=False, emoji=False, highlight=False)

# Cc: terminal escapes. Cf: text that runs right to left or has no width. Cs: half of a character,
# as in the path of a file that is not UTF-8, which cannot be written. Zl, Zp: line ends.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: object, keep: str = "\n") -> str:
    r"""The text with every character that a terminal would obey or hide spelled out, as `\x1b`.

    Args:
      text: anything; its `str` is used.
      keep: control characters to leave as they are.

    Returns:
      text that is safe to print; printable text, brackets and emoji included, is unchanged.
    """
    return "".join(
        c if c in keep or unicodedata.category(c) not in HIDDEN else _spelled(ord(c))
        for c in str(text)
    )


def _spelled(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@contextlib.contextmanager
def silenced(on: bool) -> Iterator[None]:
    """Where `on` is true, nothing is printed for people: what follows is JSON."""
    console.quiet = on
    try:
        yield
    finally:
        console.quiet = False


def tell(text: str) -> None:
    """Prints a sentence, wrapped to the screen."""
    console.print(Text(visible(text)), overflow="fold")


def show_fields(fields: Mapping[str, Any], title: str | None = None) -> None:
    """Prints names and values, one field a row; long values are folded."""
    if title:
        tell(title)
    console.print(_blocks([fields]))


def show_table(
    rows: Sequence[Mapping[str, Any]], title: str | None = None, empty: str = "nothing"
) -> None:
    """Prints rows that all have the same columns.

    Args:
      rows: the columns of each row, by title. Numbers are aligned to the right; a `rich.text.Text`
        keeps its style.
      title: a line before the table.
      empty: what to say where there are no rows.

    A table that is wider than the screen is printed row after row, one column a line, so that
    nothing is cut or squeezed.
    """
    if not rows:
        tell(f"{title}: {empty}" if title else empty)
        return
    if title:
        tell(title)
    table = Table()
    for name in rows[0]:
        numbers = all(isinstance(row[name], int | float) for row in rows)
        table.add_column(_cell(name), justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    unlimited = console.options.update(width=100_000)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table)
    else:
        console.print(_blocks(rows))


def _blocks(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of two columns, names and values, with a line between one row's and the next's."""
    widest = max((len(name) for row in rows for name in row), default=0)
    table = Table(show_header=False)
    table.add_column(overflow="fold", min_width=min(24, widest))
    table.add_column(overflow="fold")
    for row in rows:
        for name, value in row.items():
            table.add_row(_cell(name), _cell(value))
        table.add_section()
    return table


def _cell(value: Any) -> Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return Text("" if value is None else visible(value))
