"""The process itself: what has to be set before JAX is imported, or before any thread starts."""

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a second SIGINT does while the first one waits for a training to save its state: raises
# KeyboardInterrupt once Python gets to run. In the command, it ends the process.
second_interrupt: Callable[[int, Any], Any] | signal.Handlers = signal.default_int_handler
LARGE_PAGES = "glibc.malloc.hugetlb"


def end_at_second_interrupt() -> None:
    """Lets a second SIGINT end the process, even while it waits for a device or a disk.

    Nothing breaks: checkpoints appear complete or not at all.
    """
    global second_interrupt
    second_interrupt = signal.SIG_DFL


def leave_libtpu_alone() -> None:
    """Keeps JAX from looking for a TPU where libtpu is installed for planning only.

    JAX would print pages of warnings, and jaxlib 0.10.2 then crashes in a trace
    (PluginTracer::Start). Must be called before JAX is imported.
    """
    has_tpu = any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("vfio/*"))
    if importlib.util.find_spec("libtpu") and not has_tpu:
        has_cuda = importlib.util.find_spec("jax_cuda13_plugin")
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if has_cuda else "cpu")


def with_large_pages() -> dict[str, str]:
    """The environment in which glibc's malloc uses the system's large pages.

    A training step on CPU touches gigabytes; in pages of 4 KB, it spends much of its time on
    misses of the translation buffer.
    """
    given = os.environ.get("GLIBC_TUNABLES")
    if given and LARGE_PAGES in given:  # even if it turns them off
        return dict(os.environ)
    tunables = f"{given}:{LARGE_PAGES}=1" if given else f"{LARGE_PAGES}=1"
    return {**os.environ, "GLIBC_TUNABLES": tunables}


def use_large_pages() -> None:
    """Restarts this program with large pages: glibc reads its settings only at the start."""
    wanted = with_large_pages()
    if sys.platform == "linux" and wanted != os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
