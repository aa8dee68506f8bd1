"""Pages of results: Markdown tables, where pages and figures go, and the machine of a measurement.

In a checkout, pages go to docs/ and JSON and figures to docs/results/ unless the command line says
otherwise. An installed package has no docs/: its pages are printed only.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.storage.files import replace_file

RESULTS = Path(__file__).parents[3] / "docs" / "results"  # of a checkout
RULES = {"l": "---", "r": "---:"}


def add_page_argument(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds --page, by default docs/NAME of the checkout."""
    default = RESULTS.parent / name if RESULTS.is_dir() else None
    parser.add_argument(
        "--page", type=Path, default=default, metavar="FILE",
        help=f"the page to write; by default docs/{name} of a checkout, elsewhere it is printed",
    )  # fmt: skip


def add_results_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --results, by default docs/results of the checkout."""
    is_checkout = RESULTS.is_dir()
    parser.add_argument(
        "--results", type=Path, default=RESULTS if is_checkout else None, metavar="DIR",
        required=not is_checkout, help="folder of JSON and figures; by default docs/results of a "
        "checkout",
    )  # fmt: skip


def table(head: Sequence[object], rows: Sequence[Sequence[object]], align: str = "lr") -> list[str]:
    """The lines of a Markdown table.

    Args:
      head: titles of the columns.
      rows: cells; each is shown as its `str`.
      align: "l" or "r" for each column; the last letter holds for all further columns.
    """
    letters = align.ljust(len(head), align[-1])
    lines = [head, [RULES[letter] for letter in letters], *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def machine() -> str:
    """The machine that this runs on, in words: "2 cores (x86_64, Linux)"."""
    return f"{os.cpu_count()} cores ({platform.machine()}, {platform.system()})"


def without_paths(report: Any, *folders: Path) -> Any:
    """JSON values in which what lies in these folders is named by its path from there."""
    text = json.dumps(report)
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    return json.loads(text)


def link(file: Path, page: Path | None) -> str:
    """How a page names a file: by its path from the page's folder, or, without page, its path."""
    return str(file) if page is None else os.path.relpath(file, page.parent)


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON value, all at once; creates the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(value, indent=1) + "\n")


def write_page(page: Path | None, lines: Sequence[str]) -> None:
    """Prints a page and writes it to its file, if it has one."""
    text = "\n".join(lines) + "\n"
    print(text)
    if page is not None:
        replace_file(page, text)


def write_part(page: Path | None, mark: str, lines: Sequence[str]) -> None:
    """Prints a part of a page, and replaces what stands between the marks of that part.

    Raises:
      ValueError: the page lacks the two comments that mark the part.
    """
    print("\n".join(lines) + "\n")
    if page is None:
        return
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, closing, after = rest.partition(end)
    if not closing:
        raise ValueError(f"{page}: expected the lines {start} and {end}")
    replace_file(page, "\n".join([before + start, *lines, end + after]))
