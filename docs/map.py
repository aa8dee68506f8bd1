"""Writes the map of the code in CONTRIBUTING.md: the first line of each module, room by room."""

import ast
import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flexolmo_jax"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- The map: `make map` writes it. -->\n", "<!-- The end of the map. -->\n"


def rooms() -> list[str]:
    """Folders and files of the package, from the top, as the contract in .importlinter has them."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    layers = contract["importlinter:contract:layers"]["layers"]
    return layers.replace("|", " ").replace(":", " ").split()


def first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def room_lines(folder: Path) -> list[str]:
    name = folder.relative_to(PACKAGE).as_posix()
    lines = [f"### {name}/", "", first_line(folder / "__init__.py"), ""]
    files = sorted(f for f in folder.glob("*.py") if f.name != "__init__.py")
    lines += [f"- `{file.name}`: {first_line(file)}" for file in files]
    lines += [""] if files else []
    for inner in sorted(f.parent for f in folder.glob("*/__init__.py")):
        lines += room_lines(inner)
    return lines


def draw() -> str:
    lines = []
    for room in rooms():
        file, folder = PACKAGE / f"{room}.py", PACKAGE / room
        if file.exists():
            lines += [f"### {file.name}", "", first_line(file), ""]
        elif folder.is_dir():
            lines += room_lines(folder)
    return BEGIN + "\n" + "\n".join(lines) + "\n" + END


def redrawn(page: str) -> str:
    """The text of a page with the map of today in it."""
    before, _, rest = page.partition(BEGIN)
    return before + draw() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
