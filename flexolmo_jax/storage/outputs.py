"""Checks where a command is about to write, before it does any work.

A long training must not end with an error that could be seen before its first step, and nothing
that exists may be overwritten or broken. A refused command leaves nothing behind.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WINDOWS = 0.5  # bytes of windows for each byte of text, at least
NO_FILES = ("corpus:", "tfds:")  # sources that are not paths


def check_new_folder(folder: str | Path, reads: Iterable[str | Path] = ()) -> None:
    """Checks that a folder can be written, complete, in one rename.

    Args:
      folder: must not exist, or be an empty folder.
      reads: the sources and packages that the command reads.

    Raises:
      ValueError: it exists, is a link or a mount point, lies in or around something that it would
        break, or cannot be written.
    """
    folder = Path(folder)
    if os.path.islink(folder):
        raise ValueError(
            f"{folder}: is a link to {os.readlink(folder)}; name the folder itself, which must be "
            "new or empty"
        )
    if os.path.lexists(folder):
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(f"{folder}: already there; choose another --out, or delete it first")
        if os.path.samefile(folder, os.curdir):
            raise ValueError(
                f"{folder}: is the folder that this command runs in, which a rename would "
                "remove; choose a folder inside it"
            )
        if _is_mount_point(folder):
            raise ValueError(
                f"{folder}: is a mount point, which cannot be replaced in one rename; choose a "
                "folder inside it"
            )
    _check_place(folder, reads)
    _check_writable(folder.absolute())


def check_kept_folder(
    folder: str | Path, reads: Iterable[str | Path] = (), *, holding: Sequence[str] | None = None
) -> None:
    """Checks that a folder can be written into, and that what is in it is the command's own.

    Args:
      folder: may be there.
      reads: as in `check_new_folder`.
      holding: patterns of file names that mark a folder as the command's own: a folder that is not
        empty must hold such a file. (): it must be empty. None: anything may be in it.

    Raises:
      ValueError: as `check_new_folder`; it is no folder, or holds something else.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder there, or nothing; choose another")
    if holding is not None and folder.is_dir() and any(folder.iterdir()):
        if not any(next(folder.glob(pattern), None) for pattern in holding):
            why = f" and not made by this command: it holds no {' or '.join(holding)}"
            raise ValueError(
                f"{folder}: already there{why if holding else ''}; choose another folder, or "
                "delete it first"
            )
    if found := _what_is(Path(os.path.realpath(folder)), runs=False):
        raise ValueError(f"{folder}: is {found}; choose another folder")
    _check_place(folder, reads)
    _check_writable(folder.absolute(), inside=folder.is_dir())


def check_new_file(file: str | Path, reads: Iterable[str | Path] = ()) -> None:
    """Checks that a file can be written; raises ValueError as `check_new_folder`."""
    file = Path(file)
    if os.path.lexists(file):
        raise ValueError(f"{file}: already there; choose another --out, or delete it first")
    _check_place(file, reads)
    _check_writable(file.absolute())


def check_training(
    out: Path,
    run: Path,
    reads: Sequence[str | Path],
    *,
    ledger: str | Path | None = None,
    profile: str | Path | None = None,
) -> None:
    """Checks all places that a training writes to.

    Args:
      out: of the package; new.
      run: of the run; may be there, to be resumed.
      reads: texts, anchor or model.
      ledger: the file of all private runs, if it is named; may be there.
      profile: folder of a trace.

    Raises:
      ValueError: as `check_new_folder`; or one of the places lies in another.
    """
    check_new_folder(out, reads)
    check_kept_folder(run, reads)
    kept: dict[str, str | Path] = {"the run folder": run}
    if profile is not None:
        check_kept_folder(profile, reads)
        kept["the profile"] = profile
    if ledger is not None:
        if os.path.isdir(ledger):
            raise ValueError(f"{ledger}: is a folder; name the ledger's file")
        _check_place(ledger, reads)
        kept["the ledger"] = ledger
    for what, place in kept.items():
        if _is_in(place, out):
            raise ValueError(
                f"{place}: {what} would lie in the package {out}, which holds nothing else; "
                "choose a place beside it"
            )
    if _is_in(out, run):
        raise ValueError(
            f"{out}: would lie in the run folder {run}, which is yours alone; choose another --out"
        )


def check_room(out: Path, run: Path, *, text: int, state: int, packaged: int, saves: int) -> None:
    """Checks that the disk has room for what a training writes: a lower estimate.

    Args:
      out, run: where the package and the run go.
      text: bytes of the source, whose windows are written into `run`; 0 where it is unknown.
      state: bytes of a checkpoint.
      packaged: how many weights are written into packages, float32.
      saves: how many checkpoints the training writes; two are kept.

    Raises:
      ValueError: there is clearly too little; the text has the numbers, in bytes.
    """
    parts = {
        "windows": (run, int(WINDOWS * text)),
        "checkpoints": (run, state * min(saves, 2)),
        "package": (out, 4 * packaged),
    }
    existing = _bytes_of_folder(run)  # of a run that is resumed
    device = {place: _existing(Path(os.path.realpath(place))).stat().st_dev for place in (run, out)}
    for place in (run, out):
        needed = sum(size for folder, size in parts.values() if device[folder] == device[place])
        needed -= existing if device[place] == device[run] else 0
        free = shutil.disk_usage(_existing(Path(os.path.realpath(place)))).free
        if needed > free:
            listed = ", ".join(f"{name} {_size(size)}" for name, (_, size) in parts.items())
            already = f", of which {_size(existing)} are there already" if existing else ""
            raise ValueError(
                f"{place}: not enough room on the disk: {_size(needed)} more are needed at least "
                f"({listed}{already}), {_size(free)} are free; make room, or choose another --out "
                "and --run"
            )


def _check_place(place: str | Path, reads: Iterable[str | Path]) -> None:
    """Raises ValueError if `place` lies in something that a new file breaks, or around it."""
    for source in reads:
        if str(source).startswith(NO_FILES):
            continue
        if _is_in(place, source):
            raise ValueError(
                f"{place}: lies in {source}, which is read; what is written there would become a "
                "part of it. Choose a place outside of it"
            )
        if _is_in(source, place):
            raise ValueError(
                f"{place}: would hold {source}, which is read; choose another place to write to"
            )
    for folder in Path(os.path.realpath(place)).parents:
        if found := _what_is(folder):
            raise ValueError(
                f"{place}: lies in {folder}, which is {found}, and must not hold anything else; "
                "choose a place outside of it"
            )


def _is_in(inner: str | Path, outer: str | Path) -> bool:
    """Whether a place is another, or lies below it, whatever links lead there."""
    return Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer))


def _what_is(folder: Path, *, runs: bool = True) -> str | None:
    """What a folder is, if nothing may be added to it."""
    kind = _json(folder / "manifest.json").get("kind")
    if kind in ("anchor", "expert", "merged"):
        return "a merged model" if kind == "merged" else f"a package of kind {kind}"
    config = _json(folder / "config.json")
    if "model_type" in config:
        return "a Hugging Face model"
    if runs and {"steps", "optimizer", "data"} <= config.keys():
        return "the folder of a run"
    return None


def _json(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; none where it is missing or something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_mount_point(folder: Path) -> bool:
    """Also of a bind mount of the same file system, which `os.path.ismount` does not see."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False  # not Linux
    # The fifth field is the place; a space in it is written as \040.
    places = (
        re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])
        for line in lines
    )
    return os.path.realpath(folder) in places


def _check_writable(place: Path, inside: bool = False) -> None:
    """Checks it by making, and removing, a folder with the name of a partial write.

    Args:
      place: absolute.
      inside: something is written into it, not beside it.
    """
    folder = place if inside else _existing(place.parent)
    trial = folder / f".{place.name}.{uuid.uuid4().hex}.partial"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise ValueError(
            f"{place}: cannot be written ({error.strerror}, in {folder}); choose another place, or "
            "change what is allowed there"
        ) from error


def _existing(place: Path) -> Path:
    """The place, or the closest folder around it that exists."""
    return next(path for path in (place, *place.parents) if os.path.lexists(path))


def _bytes_of_folder(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _size(count: float) -> str:
    """10^9 is 1 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
