"""Changes of a signed package: of its files, and of all that its author could seal again."""

import random
import shutil
from typing import Any

from tests.forged.world import World
from tests.hostile import mutations

PARTS = ("anchor", "experts", "merged")
UNSIGNED_BY_RULE = (".git/config", ".github/x", ".gitignore", ".gitattributes", "params/.git/x")


def change(draw: random.Random, world: World) -> str:
    """Changes one package, and says how."""
    name = draw.choice(("anchor", "experts/math", "experts/code", "merged"))
    package = world.root / name
    content = (mutations.entries,) if name == "merged" else mutations.CONTENT
    one = draw.choice((*mutations.FILES, *content, unsigned_by_rule, another))
    before = _bytes(world)
    try:
        what = one(draw, package)
    except OSError:  # something stands where the change would put a file
        what = mutations.flip(draw, package)
    # Nobody could seal a named pipe in the manifest's place; reading it would not end.
    is_file = (package / mutations.MANIFEST).is_file()
    if is_file and one in mutations.FILES and draw.random() < 0.5:
        try:
            mutations.seal(package)
            what += ", sealed"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # nothing is left that could be sealed
    if _bytes(world) == before:  # such as two equal files that were swapped
        what = mutations.stray(draw, package)
    return f"{name}: {what}"


def conclusion(world: World) -> Any:
    """Which packages are signed by whom, and their bytes."""
    verified = world.verified()
    return verified, _bytes(world)


def unsigned_by_rule(draw: random.Random, package) -> str:
    """A file where the format signs none."""
    name = draw.choice(UNSIGNED_BY_RULE)
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_bytes(draw.randbytes(8))
    return f"a file {name}"


def another(draw: random.Random, package) -> str:
    """A sound package of the same kind in its place."""
    root = package.parents[0] if package.name in ("anchor", "merged") else package.parents[1]
    others = {"anchor": "other_anchor", "merged": "tuned"}
    other = root / others.get(package.name, "experts/third")
    shutil.rmtree(package)
    shutil.copytree(other, package)
    return f"{other.name} in its place"


def _bytes(world: World) -> dict[str, Any]:
    folders = [world.root / name for name in ("anchor", "experts/math", "experts/code", "merged")]
    return {
        str(file): file.read_bytes() if file.is_file() and not file.is_symlink() else file.lstat()
        for folder in folders
        for file in folder.rglob("*")
        if not file.is_dir() or file.is_symlink()
    }
