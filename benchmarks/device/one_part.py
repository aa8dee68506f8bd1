"""One part in this process: each result is a line of JSON on standard output.

    python -m benchmarks.device.one_part NUMBER SIZE STARTED CASE...

NUMBER is the part's place in `sections.PARTS`, STARTED the time at which the process was started.
It runs in the folder in which parts leave files for each other.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.device.sections import (
    DEVICE_CASES,
    FIRST,
    FIRST_CASE,
    PARITY,
    PARTS,
    ROUNDS,
    SIZES,
    Part,
)
from benchmarks.machine import resident

SHORT = 16  # tokens of a first generation


def main() -> None:
    number, size, started, *cases = sys.argv[1:]
    part = PARTS[int(number)]
    if not part.is_pytorch:
        from flexolmo_jax.runtime.startup import leave_libtpu_alone

        leave_libtpu_alone()  # before JAX is imported
    for case in cases:
        if case == PARITY:
            from benchmarks.device import parity

            check = parity.write_reference if part.is_pytorch else parity.compare
            found = {"checks": check(Path(), SIZES[size].config.width)}
        else:
            found = _measured(part, case, size, float(started))
        print(json.dumps({"case": case, **found}), flush=True)
        gc.collect()  # the weights of this case


def _measured(part: Part, name: str, size_name: str, started: float) -> dict[str, Any]:
    """Seconds of each timed run, of building and the first run, and since the process began."""
    size, rounds = SIZES[size_name], ROUNDS[size_name]
    case = FIRST_CASE if name == FIRST else DEVICE_CASES[name]
    if name == FIRST:
        rounds, size = 1, size._replace(new_tokens=SHORT)
    finish, peak_bytes = _device(part.is_pytorch)
    begun = time.perf_counter()
    run = (case.pytorch if part.is_pytorch else case.jax)(size, part.option)
    run()
    finish()
    first, since_start = time.perf_counter() - begun, time.time() - started
    seconds = []
    for warm_up in (True, *[False] * rounds):
        begun = time.perf_counter()
        run()
        finish()
        if not warm_up:
            seconds.append(time.perf_counter() - begun)
    return {
        "seconds": seconds, "first": first, "since_start": since_start,
        "peak_bytes": peak_bytes(),
    }  # fmt: skip


def _device(is_pytorch: bool) -> tuple[Callable[[], object], Callable[[], int]]:
    """Waits until the device is done; and its peak memory so far, or the process's on a CPU."""

    if is_pytorch:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.synchronize, torch.cuda.max_memory_allocated
        return lambda: None, lambda: resident("VmHWM")
    import jax

    def peak() -> int:
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") or resident("VmHWM")

    return lambda: None, peak  # our runs already wait


if __name__ == "__main__":
    main()
