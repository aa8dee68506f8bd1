"""What was measured, and where: the commit, the versions and the machine."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path


def commit() -> str:
    """The short commit of the code that is measured, or "unknown" outside a repository."""
    return _printed("git", "rev-parse", "--short", "HEAD") or "unknown"


def versions(*packages: str) -> str:
    """ "jax 0.10.2, ...": of those packages that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} is missing")
    return ", ".join(found)


def machine() -> str:
    """Cores and architecture."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


def gpu() -> str:
    """The name, memory and driver of the first GPU, or "" without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    fields = "--query-gpu=name,memory.total,driver_version"
    lines = _printed("nvidia-smi", fields, "--format=csv,noheader").splitlines()
    return lines[0] if lines else ""


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM the most so far.

    `ru_maxrss` is no such figure: it begins at what the parent had.
    """
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _printed(*words: str) -> str:
    """What a command prints; "" if it fails or does not exist."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
