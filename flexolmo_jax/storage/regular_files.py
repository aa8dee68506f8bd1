"""Regular files of a folder that somebody else may have written: no links, no pipes, no devices."""

import contextlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO


def list_files(folder: Path, ignored: Collection[str] = ()) -> dict[str, int]:
    """{relative path: bytes} of every file in a folder and in those below it.

    Args:
      folder: where.
      ignored: names of folders in it that are skipped.

    Raises:
      ValueError: an entry is not a regular file, but a link, a named pipe or a device.
    """
    sizes, folders = {}, [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                name = os.path.relpath(entry.path, folder)
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    if name not in ignored:
                        folders.append(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    sizes[name] = status.st_size
                else:
                    raise ValueError(f"{entry.path}: {_not_regular(status.st_mode)}")
    return sizes


@contextlib.contextmanager
def open_regular(file: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading; never blocks, whatever the file is.

    Raises:
      ValueError: it is a link, a named pipe, or anything else but a regular file.
    """
    mode = os.lstat(file).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file}: {_not_regular(mode)}")
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as opened:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):  # it was replaced in between
            raise ValueError(f"{file}: {_not_regular(mode)}")
        yield opened  # type: ignore[misc]


def _not_regular(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a link",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
    }
    found = kinds.get(stat.S_IFMT(mode), "a device")
    return f"{found}, where only regular files may be; get it again from its owner"
