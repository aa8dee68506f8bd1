"""Compiled programs are kept for the next command: JAX's compilation cache, on by default.

JAX reads and writes the entries. This file chooses the folder, keeps it below a limit, and removes
damaged entries. It has to be set up before JAX is imported.

JAX's own limit (`jax_compilation_cache_max_size`) is not used: it reads the times of all entries
whenever it writes one, and in JAX 0.10 a process that is killed while it writes leaves an entry
after which no other is written. JAX writes entries in place; a reader that meets half of one gets
an error from the decompression, and compiles.
"""

import contextlib
import hashlib
import os
import platform
import re
import stat
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"
SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"  # JAX's default keeps no small model
LIMIT = 2**30  # bytes of all entries
# The lines of /proc/cpuinfo from which LLVM chooses instructions.
OF_CPU = (
    "vendor_id", "cpu family", "model", "stepping", "flags", "isa", "Features", "CPU implementer",
    "CPU architecture", "CPU variant", "CPU part",
)  # fmt: skip


def keep_compiled_programs() -> None:
    """Sets JAX's environment variables of the cache; a folder that the user has set stays.

    Without a folder that this user alone can write, nothing is kept.
    """
    if FOLDER in os.environ:
        return
    folder = cache_folder()
    if folder is None or not _is_private(folder):
        return
    remove_oldest(folder.parent, LIMIT)
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault(SHORTEST, "0.1")


def cache_folder() -> Path | None:
    """The folder for programs of this CPU: $XDG_CACHE_HOME/flexolmo_jax/programs/ID.

    JAX's key of an entry holds the program, the compiler's options and version, but of a CPU
    neither its instructions nor the number of its cores, between which XLA divides the work.

    Returns:
      the folder, which may not exist; or None where the user has no home directory.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not cache.is_absolute():
        return None
    return cache / "flexolmo_jax" / "programs" / hashlib.sha256(_cpu().encode()).hexdigest()[:16]


def _cpu() -> str:
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
        lines = [line for line in first.splitlines() if line.partition("\t")[0].strip() in OF_CPU]
    except (OSError, UnicodeDecodeError):
        lines = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = (platform.machine(), cores, os.environ.get("NPROC"))  # XLA obeys NPROC
    return "\n".join([repr(about), *(lines or [platform.processor(), platform.node()])])


def _is_private(folder: Path) -> bool:
    """Whether only this user can write the folder, and can. Its entries are machine code."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = folder.stat()
    except OSError:
        return False
    others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return about.st_uid == os.geteuid() and not others and os.access(folder, os.W_OK | os.X_OK)


def remove_oldest(root: Path, limit: int) -> None:
    """Removes the entries that were not used for longest, if all exceed `limit` bytes.

    A quarter of the limit is made free, so that few commands have to. Another process may be doing
    the same, or be about to read an entry: JAX then compiles it.
    """
    entries = []
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):
            about = path.stat()
            entries.append((max(about.st_atime, about.st_mtime), about.st_size, path))
    total = sum(size for _, size, _ in entries)
    if total <= limit:
        return
    for _, size, path in sorted(entries):
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
        if total <= limit * 3 // 4:
            return


def is_of_cache(warning: str) -> bool:
    """Whether a warning of JAX is about an entry of this cache, and so not for the user.

    An entry that cannot be read is removed, with those of the same name: JAX would try it again in
    every process, and never replace it.
    """
    pattern = r"Error (reading|writing) persistent compilation cache entry for '([\w.-]+)'"
    found = re.match(pattern, warning)
    folder = cache_folder()
    if not found or folder is None or os.environ.get(FOLDER) != str(folder):
        return False
    if found[1] == "reading":
        for path in folder.glob(f"{found[2]}-*-cache"):
            with contextlib.suppress(OSError):
                path.unlink()
    return True
