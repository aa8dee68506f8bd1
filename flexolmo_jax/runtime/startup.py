"""The process itself: what has to be set before JAX is imported, or before any thread starts."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

LARGE_PAGES = "glibc.malloc.hugetlb"


def leave_libtpu_alone() -> None:
    """Keeps JAX from looking for a TPU where libtpu is there for planning only; before its import.

    It would print pages of warnings, and jaxlib 0.10.2 then crashes in a trace
    (PluginTracer::Start).
    """
    has_tpu = any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("vfio/*"))
    if importlib.util.find_spec("libtpu") and not has_tpu:
        has_cuda = importlib.util.find_spec("jax_cuda13_plugin")
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if has_cuda else "cpu")


def with_large_pages() -> dict[str, str]:
    """The environment in which glibc's malloc takes the system's large pages.

    A training step on CPU goes through gigabytes; in pages of 4 KB, a good part of its time goes
    into finding them.
    """
    given = os.environ.get("GLIBC_TUNABLES")
    if given and LARGE_PAGES in given:  # also where somebody has turned them off
        return dict(os.environ)
    tunables = f"{given}:{LARGE_PAGES}=1" if given else f"{LARGE_PAGES}=1"
    return {**os.environ, "GLIBC_TUNABLES": tunables}


def use_large_pages() -> None:
    """Starts this program anew if it is without them: glibc asks for its settings only then."""
    wanted = with_large_pages()
    if sys.platform == "linux" and wanted != os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def keep_freed_memory() -> None:
    """Tells glibc to hold on to large buffers; must come before any thread starts.

    By default every large buffer goes back to the system when a training step on CPU ends, and
    the next step gets it anew, cleared page by page; or, beside other programs that
    fragment memory, waits for the system to make room for large pages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # as in malloc.h
        never = -1  # the largest size there is; 2**31 - 1 bytes are one step of a small model
        mallopt(arena_max, 1)  # others would map and unmap what is larger than 64 MB
        mallopt(mmap_threshold, never)
        mallopt(trim_threshold, never)
