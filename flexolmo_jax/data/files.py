"""Which files of a folder hold text, and which are passed over.

What a file holds is told by its name alone, in small or capital letters: a suffix of a kind, with a
suffix of a compression behind it or not. `docs/text.md` is this in a user's words.
"""

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

JSON_LINES = (".jsonl", ".ndjson")
JSON = (".json",)
PARQUET = (".parquet",)
TABLES = (".csv", ".tsv")
TEXT = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
SUFFIXES = (*JSON_LINES, *JSON, *PARQUET, *TABLES, *TEXT)
EXPECTED = f"{', '.join(SUFFIXES)}, all but Parquet also with {', '.join(COMPRESSIONS)} behind it"
# Text files of these names, beside data, are about the data.
ABOUT = frozenset(
    "readme license licence licenses licences copying notice citation changelog changes "
    "contributing authors credits code_of_conduct security dataset_card datasheet".split()
)


class Kind(NamedTuple):
    """What a file's name says of it."""

    suffix: str  # one of SUFFIXES
    compression: str  # one of COMPRESSIONS, or empty


class Found(NamedTuple):
    """The files of a source."""

    files: list[Path]  # to read, in the order of their names
    passed_over: list[str]  # those that are not read: the path below the source, and why


def kind_of(path: Path) -> Kind | None:
    """What a file holds, by its name; None for all that cannot be read."""
    *before, last = path.suffixes[-2:] or [""]
    last = last.lower()
    if last in SUFFIXES:
        return Kind(last, "")
    inner = before[0].lower() if before else ""
    if last in COMPRESSIONS and inner in SUFFIXES and inner not in PARQUET:
        return Kind(inner, last)
    return None


def find_files(path: Path) -> Found:
    """The files to read of a file or folder.

    A folder is searched in depth. Links are followed, but no file and no folder is read twice, nor
    a folder that holds the link to it. Names that begin with a dot are skipped silently:
    they are what systems and tools leave behind. README, LICENSE and their like are passed over
    where there is anything but text files.

    Raises:
      ValueError: there is no such file or folder, it is a pipe or a device, or it holds nothing
        that can be read.
      OSError: a folder cannot be listed.
    """
    if not path.exists():
        raise ValueError(
            f"{path}: no such file or folder; expected one of {EXPECTED}; a folder of them, "
            "corpus:NAME, or tfds:NAME"
        )
    if not path.is_dir():
        _check_file(path)
        return Found([path], [])
    files: list[Path] = []
    passed_over: list[str] = []
    only_text = True
    met: set[Path] = set()
    for file, why in _walk(path, {path.resolve()}):
        kind = kind_of(file)
        if why is None and not _is_about(file):
            only_text &= kind is not None and kind.suffix in TEXT
        if why is None and kind is None:
            why = ""
        elif why is None and file.resolve() in met:
            why = "the same file again"
        elif why is None:
            met.add(file.resolve())
            files.append(file)
            continue
        name = str(file.relative_to(path))
        passed_over.append(f"{name}: {why}" if why else name)
    if not only_text:
        about = [file for file in files if _is_about(file)]
        passed_over += [f"{file.relative_to(path)}: about the data" for file in about]
        files = [file for file in files if not _is_about(file)]
    if not files:
        holds = f"; it holds {some_of(sorted(passed_over))}" if passed_over else ""
        raise ValueError(
            f"{path}: the folder holds no file that can be read{holds}; expected names ending in "
            f"{EXPECTED}"
        )
    return Found(sorted(files), sorted(passed_over))


def some_of(names: list[str], most: int = 8) -> str:
    """How many files, and the names of the first ones."""
    return (
        f"{counted(len(names), 'file')} ({', '.join(names[:most])}{', ...' * (len(names) > most)})"
    )


def counted(number: int, what: str) -> str:
    """As "1 file" or "1,234 files"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def _check_file(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise ValueError(
            f"{path}: expected a file or a folder, found {what}; text is read several times, so "
            "write it to a file first"
        )
    if kind_of(path) is None:
        raise ValueError(
            f"{path}: cannot read files ending in {''.join(path.suffixes[-2:])!r}; expected one of "
            f"{EXPECTED}"
        )


def _walk(folder: Path, entered: set[Path]) -> Iterator[tuple[Path, str | None]]:
    """Every path below a folder that is no folder, and why it cannot be a file to read.

    Args:
      folder: where to look.
      entered: the folders that were entered, resolved; none is entered again.
    """
    later = []  # links come last, so that what they lead to keeps its own name if it is here too
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_symlink():
            later.append(path)
        else:
            yield from _look_at(path, entered)
    for path in later:
        yield from _look_at(path, entered)


def _look_at(path: Path, entered: set[Path]) -> Iterator[tuple[Path, str | None]]:
    if not path.exists():
        yield path, "a link that leads nowhere"
    elif path.is_file():
        yield path, None
    elif not path.is_dir():
        yield path, "a pipe, a device or a socket"
    elif path.is_symlink() and path.resolve() in path.parent.resolve().parents:
        yield path, "a link to a folder that holds it"
    elif path.resolve() in entered:
        if path.is_symlink():
            yield path, "a link to a folder that is read anyway"
    else:
        entered.add(path.resolve())
        yield from _walk(path, entered)


def _is_about(path: Path) -> bool:
    """Whether a file is about what it lies beside: by its name, and not a file of rows."""
    kind = kind_of(path)
    name = path.name.split(".")[0].lower().replace("-", "_")
    return name in ABOUT and (kind is None or kind.suffix in TEXT)
