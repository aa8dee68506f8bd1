"""A process that prints results, and may crash or take too long: what it printed before counts."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_REASON = 300  # characters


def run(
    words: Sequence[str], folder: Path, environment: dict[str, str], log: Path, limit: float
) -> tuple[dict[str, dict[str, Any]], str]:
    """Runs a command, and ends it and all that it has started after a time.

    Args:
      words: the command.
      folder: in which it runs.
      environment: all of its variables.
      log: the file to which what it prints to standard error is added.
      limit: seconds.

    Returns:
      {case: result} from its lines of JSON on standard output, each with a field "case"; and why
      there are no more of them.
    """
    with log.open("a") as errors:
        begin = errors.tell()
        process = subprocess.Popen(
            words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=limit)
            why = _reason(log, begin) or f"it ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what PyTorch's compiler has started
            printed, _ = process.communicate()
            why = f"stopped after {limit:.0f} s"
    return _results(printed), why


def _results(printed: str) -> dict[str, dict[str, Any]]:
    """Libraries print to standard output too, and a killed process may leave half a line."""
    found = {}
    for line in printed.splitlines():
        with contextlib.suppress(ValueError):
            result = json.loads(line)
            if isinstance(result, dict) and "case" in result:
                found[result.pop("case")] = result
    return found


def _reason(log: Path, begin: int) -> str:
    """The last error that was logged from `begin` on, or else the last line."""
    with log.open("rb") as opened:
        opened.seek(begin)
        lines = opened.read().decode(errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if "Error" in line or "RESOURCE_EXHAUSTED" in line]
    return (errors or lines or [""])[-1][:MAX_REASON]
