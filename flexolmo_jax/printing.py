"""What people read on the screen: one console, tables that fit it, and text of strangers.

Manifests come from people nobody knows. Their text may hold terminal escapes, which could clear the
screen or retitle the window, and brackets, which rich would take for markup. So the console parses
no markup, and whatever is printed by the functions here passes through `visible`.
"""

import unicodedata
from collections.abc import Mapping, Sequence
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


def tell(text: str) -> None:
    """Prints a sentence, wrapped to the screen."""
    console.print(Text(visible(text)), overflow="fold")


def show_fields(fields: Mapping[str, Any], title: str | None = None) -> None:
    """Prints names and values, one field a row; long values are folded."""
    if title:
        tell(title)
    table = Table(show_header=False)
    table.add_column(overflow="fold", min_width=min(24, max(map(len, fields), default=0)))
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(_cell(name), _cell(value))
    console.print(table)


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
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(table)
    else:
        for row in rows:
            show_fields(row)


def _cell(value: Any) -> Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return Text("" if value is None else visible(value))
