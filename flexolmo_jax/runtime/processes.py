"""Several processes: how they find each other, and what only the main process does.

Every process runs the same program. All of them take part in steps and checkpoints. Process 0, the
main process, alone prepares data, writes metrics, figures and packages, and prints. The folders of
a run must lie on a file system that all processes share.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int = 300,
) -> None:
    """Joins the other processes; must be called before any other use of JAX.

    Args:
      coordinator: host:port that process 0 listens at.
      processes: the number of processes.
      process: the index of this process, from 0.
        All three may be None on Cloud TPU, under Slurm, Open MPI, and in a Kubernetes JobSet,
        where JAX finds them itself.
      wait: seconds until all processes must have joined.

    If process 0 is reached but not all processes join in time, this prints an error and ends the
    process.

    Raises:
      ValueError: only some of the three are given, or they are out of range.
      TimeoutError: process 0 could not be reached.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError(
            "give all of --coordinator, --processes and --process, or none of them if the "
            "cluster provides them (Cloud TPU, Slurm, Open MPI, Kubernetes)"
        )
    if coordinator is not None and processes is not None and process is not None:
        if not 0 <= process < processes:
            raise ValueError(
                f"--process must be from 0 to {processes - 1}, as --processes is {processes}; "
                f"found {process}"
            )
        host, colon, port = coordinator.rpartition(":")
        if not colon or not host or not port.isdigit():
            raise ValueError(f"--coordinator must be HOST:PORT, found {coordinator!r}")
        if process:  # JAX would end this process without a message to the user
            _reach(host, int(port), wait)
    # If not all join, JAX ends the process with pages of C++ traces; the timer is a little earlier.
    alone = threading.Timer(wait, _end_alone, (wait,))
    alone.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=wait + 30,
            shutdown_timeout_seconds=24 * 3600,  # process 0 writes the package; others wait for it
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(
            "no cluster was detected (Cloud TPU, Slurm, Open MPI, Kubernetes): give "
            f"--coordinator, --processes and --process ({error})"
        ) from error
    finally:
        alone.cancel()


def _end_alone(wait: int) -> None:
    print(
        f"flexolmo: error: not all processes joined within {wait} s: check that each was started, "
        "with the same --coordinator and --processes, and its own --process",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(2)


def _reach(host: str, port: int, wait: int) -> None:
    """Waits until a process listens at this address."""
    deadline = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"no answer from {host}:{port} within {wait} s ({error}): check that process 0 "
                    "was started there, that --coordinator names its host and a free port, and "
                    "that no firewall is in between"
                ) from error
            time.sleep(0.2)


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def one_process_at_a_time(work: Callable[[], T]) -> T:
    """Runs work() in process 0, then in all others, which can use its results on disk.

    Raises:
      RuntimeError: in the other processes, if process 0 failed.
    """
    if is_main_process():
        return raise_together(work)
    _wait_for_main()
    return work()


def on_main_process(work: Callable[[], Any]) -> None:
    """Runs work() in process 0 only; the others wait until it is done.

    Raises:
      RuntimeError: in the other processes, if process 0 failed.
    """
    if is_main_process():
        raise_together(work)
    else:
        _wait_for_main()


def raise_together(work: Callable[[], T]) -> T:
    """Runs work() in every process, and returns once all are done.

    Raises:
      ValueError: work() succeeded here, but failed in another process.
    """
    try:
        result = work()
    except BaseException:
        all_agree(False)
        raise
    if not all_agree(True):
        raise ValueError("another process failed; see its error")
    return result


def all_agree(ok: bool) -> bool:
    """Whether `ok` is true in every process; all processes must call this."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _wait_for_main() -> None:
    if not all_agree(True):
        raise RuntimeError("process 0 failed; see its error")
