"""The documentation is true: what pages name exists, and the examples of the public API run."""

import ast
import doctest
import re
import runpy
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import flexolmo_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flexolmo_jax"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PUBLIC = sorted(set(flexolmo_jax.__all__) - {"__version__"})
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")
FILES = {"html", "json", "jsonl", "md", "npy", "png", "py", "safetensors", "sh"}
DOTTED = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)(\(.*\))?")


def page_names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def members(node: ast.AST) -> set[str]:
    """Names that the body of a module or class defines, with the attributes of `self`."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            names.add(child.name)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.add(child.id)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            names.add(child.attr)
    return names


@pytest.fixture(scope="module")
def defined() -> dict[str, set[str]]:
    """What each module and each class defines; modules and classes of one name together."""
    known = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        known[file.stem] |= members(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                known[node.name] |= members(node)
    return known


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_every_link_leads_to_a_file(page):
    links = [x for x in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in x]
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_every_file_that_a_page_names_exists(page):
    missing = []
    for name in CODE.findall(page.read_text(encoding="utf-8")):
        first, slash, _ = name.partition("/")
        ours = any((folder / first).is_dir() for folder in (ROOT, PACKAGE))
        is_route = not first  # of the server
        if slash and not is_route and " " not in name and (ours or name.endswith(".py")):
            beside = any((folder / name).exists() for folder in (ROOT, PACKAGE, page.parent))
            if not beside and not any(PACKAGE.rglob(name)):
                missing.append(name)
    assert not missing


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=page_names)
def test_every_function_that_a_page_names_exists(page, defined):
    missing = []
    for name in CODE.findall(page.read_text(encoding="utf-8")):
        dotted = DOTTED.fullmatch(name)
        if dotted and dotted[1] in defined and dotted[2] not in defined[dotted[1]] | FILES:
            missing.append(name)
    assert not missing


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: flexolmo_jax\.[\w.]*?(\w+)$", reference, re.MULTILINE)
    assert sorted(documented) == PUBLIC


@pytest.fixture
def owners_folder(world, tmp_path, monkeypatch):
    """The working folder of the examples: an anchor, two packages, their merge, and texts."""
    for folder in ("anchor", "experts"):
        shutil.copytree(world.root / folder, tmp_path / folder)
    shutil.copytree(world.merged, tmp_path / "ours")
    for text in world.texts.values():
        shutil.copy(text, tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_a_public_name_run(name, owners_folder):
    public = getattr(flexolmo_jax, name)
    module = sys.modules[public.__module__]
    tests = doctest.DocTestFinder().find(public, name, module=module, globs={})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    printed: list[str] = []
    for test in tests:
        runner.run(test, out=printed.append)
    assert runner.tries and not runner.failures, "".join(printed)


def test_the_map_of_contributing_is_drawn_from_the_tree():
    chart = runpy.run_path(str(ROOT / "docs" / "map.py"))
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert page == chart["redrawn"](page), "run `make map`"


def test_every_module_says_in_one_line_what_it_is_for():
    unclear = []
    for file in PACKAGE.rglob("*.py"):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        first = text.split("\n\n")[0]
        if "\n" in first or not first.endswith((".", "?")):
            unclear.append(page_names(file))
    assert not unclear
