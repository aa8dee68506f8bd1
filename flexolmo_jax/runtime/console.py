"""What people read on the screen: one console for results, one for progress, one kind of bar.

Manifests come from strangers. Their text may hold terminal escapes, which could clear the screen
or retitle the window, and brackets, which rich would read as markup. So no console here parses
markup, and everything that these functions print passes through `visible`.
"""

import contextlib
import json
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(markup=False, emoji=False, highlight=False)
progress_console = Console(stderr=True, markup=False, emoji=False, highlight=False)
MAX_SILENCE = 30.0  # seconds: roughly the longest pause between two lines of progress in a log

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


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: a Chinese character takes two."""
    return cell_len(text)


def cropped(text: str, most: int) -> str:
    """The beginning of a text that takes this many columns."""
    return set_cell_size(text, most) if columns(text) > most else text


def _spelled(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@contextlib.contextmanager
def silenced(on: bool) -> Iterator[None]:
    """Prints no results for people while the body runs, if `on`: the command prints JSON."""
    before, console.quiet = console.quiet, on
    try:
        yield
    finally:
        console.quiet = before


def silence_progress() -> None:
    """Prints no progress from now on: of several processes, only the main one does."""
    progress_console.quiet = True


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
    """Prints no progress while the body runs: it is short, or others tell of it."""
    before, progress_console.quiet = progress_console.quiet, True
    try:
        yield
    finally:
        progress_console.quiet = before


def tell(text: str) -> None:
    """Prints a sentence to standard output, wrapped to the screen."""
    console.print(Text(visible(text)), overflow="fold")


def log(text: str) -> None:
    """Prints a line about the progress of the work to standard error, not wrapped."""
    progress_console.print(Text(visible(text)), soft_wrap=True)


def print_json(value: Any) -> None:
    """Prints a value to standard output as JSON, in ASCII; NumPy and JAX scalars as numbers.

    Raises:
      ValueError: a number in it is NaN or infinite, which JSON cannot express.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False, default=float)
    except ValueError as error:
        raise ValueError(
            f"a number of the result is NaN or infinite, so nothing is printed ({error})"
        ) from error
    print(text)


class Bar:
    """The progress of one piece of work; see `progress`."""

    def __init__(self, title: str, total: int, done: int, unit: str):
        self.title, self.total, self.done, self.unit = visible(title), total, done, unit
        self.notes = ""
        self._started = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None  # when a line was printed first; how much done

    def advance(self, count: int = 1, *notes: str) -> None:
        """Adds `count` to what is done; `notes` replace those shown before."""
        self.update(self.done + count, *notes)

    def update(self, done: int, *notes: str) -> None:
        """Sets how much is done; `notes` replace those shown before."""
        self.done, self.notes = done, ", ".join(filter(None, notes))
        self._show()

    def _show(self) -> None:
        """Prints a line: often at first, so that a log soon shows that all is well, then rarely."""
        now = time.monotonic()
        pause = min(MAX_SILENCE, (now - self._started) / 20)
        if not self.done:  # nothing to report yet
            return
        if self._first and self.done < self.total and now - self._last < pause:
            return
        self._last = now
        left = ""
        if self._first is None:
            self._first = (now, self.done)  # the first step takes longer, as JAX compiles it
        elif self.done > self._first[1]:
            seconds = (now - self._first[0]) / (self.done - self._first[1])
            left = f"{_duration(seconds * (self.total - self.done))} left"
        count = f"{self.unit} {self.done}/{self.total}".strip()
        log(", ".join(filter(None, (f"{self.title}: {count}", self.notes, left))))


class _TerminalBar(Bar):
    def __init__(self, title: str, total: int, done: int, unit: str, bars: Progress):
        super().__init__(title, total, done, unit)
        self._bars = bars
        self._task = bars.add_task(self.title, total=total, completed=done, unit=unit, notes="")

    def _show(self) -> None:
        self._bars.update(self._task, completed=self.done, notes=visible(self.notes))


@contextlib.contextmanager
def progress(
    title: str, total: int, done: int = 0, unit: str = "", *, quiet: bool = False
) -> Iterator[Bar]:
    """Shows the progress of a piece of work on standard error.

    On a terminal it is a bar; in a log (nohup, Slurm) it is lines, with the time that is left.

    Args:
      title: what the work is.
      total: how many units there are.
      done: how many are done already.
      unit: what they are, in the singular.
      quiet: show nothing.
    """
    shown = progress_console.is_interactive or progress_console.is_jupyter
    if not shown and not quiet:
        yield Bar(title, total, done, unit)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[unit]} {task.completed}/{task.total}", markup=False),
        TextColumn("{task.fields[notes]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=progress_console, disable=quiet) as bars:
        yield _TerminalBar(title, total, done, unit, bars)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


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
      rows: the columns of each row, by title. Numbers are aligned to the right; a cell that
        `coloured` made keeps its colours.
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


def coloured(*parts: str | tuple[str, str]) -> Text:
    """A cell of a table: texts, or pairs of a text and its colour."""
    return Text.assemble(*parts)


def _cell(value: Any) -> Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return Text("" if value is None else visible(value))
