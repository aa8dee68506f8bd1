"""Several processes: how they find each other, and who does what only one may do.

Every process runs the same program. All of them take part in steps and checkpoints; process 0
alone prepares data, writes metrics, pictures and packages, and prints. The folders of a run are on
a file system that all of them see.
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
    """Joins the other processes; before any other use of JAX.

    Args:
      coordinator: host:port where process 0 listens.
      processes: how many there are.
      process: the number of this one, from 0.
        All three may be left out on Cloud TPU, under Slurm, Open MPI, and in a Kubernetes JobSet,
        where JAX finds them itself.
      wait: seconds until all have to be there.

    Where process 0 was reached and not all come in time, it says so and ends the process.

    Raises:
      ValueError: only some of the three are given, or they cannot be.
      TimeoutError: process 0 could not be reached.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError(
            "give all of --coordinator, --processes and --process, or none of them where the "
            "cluster says it (Cloud TPU, Slurm, Open MPI, Kubernetes)"
        )
    if coordinator is not None and processes is not None and process is not None:
        if not 0 <= process < processes:
            raise ValueError(
                f"--process must be in 0 to {processes - 1}, one for each of --processes "
                f"{processes}; found {process}"
            )
        host, colon, port = coordinator.rpartition(":")
        if not colon or not host or not port.isdigit():
            raise ValueError(f"--coordinator must be HOST:PORT, found {coordinator!r}")
        if process:  # JAX would end this process, without a word to the user
            _reach(host, int(port), wait)
    # JAX ends the process itself when not all come, with pages of C++; this is a little sooner.
    alone = threading.Timer(wait, _end_alone, (wait,))
    alone.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=wait + 30,
            shutdown_timeout_seconds=24 * 3600,  # process 0 writes the package; others wait for it
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(
            "no cluster was found here (Cloud TPU, Slurm, Open MPI, Kubernetes): give "
            f"--coordinator, --processes and --process ({error})"
        ) from error
    finally:
        alone.cancel()


def _end_alone(wait: int) -> None:
    print(
        f"flexolmo: error: the processes did not all come together within {wait} s: see that each "
        "was started, with the same --coordinator and --processes, and another --process",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(2)


def _reach(host: str, port: int, wait: int) -> None:
    """Waits until something listens there."""
    deadline = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"nothing answers at {host}:{port} within {wait} s ({error}): see that process "
                    "0 was started there, that --coordinator names its host and a free port, and "
                    "that no firewall stands between"
                ) from error
            time.sleep(0.2)


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def one_process_at_a_time(work: Callable[[], T]) -> T:
    """work() by process 0, and then by all others, which find what it has made.

    Raises:
      RuntimeError: in the other processes, if process 0 failed.
    """
    if is_main_process():
        return raise_together(work)
    _listen()
    return work()


def on_main_process(work: Callable[[], Any]) -> None:
    """work() by process 0 alone; the others wait until it is done.

    Raises:
      RuntimeError: in the other processes, if process 0 failed.
    """
    if is_main_process():
        raise_together(work)
    else:
        _listen()


def raise_together(work: Callable[[], T]) -> T:
    """work() by every process; all go on once all are done.

    Raises:
      ValueError: here all was well, and elsewhere something was not.
    """
    try:
        made = work()
    except BaseException:
        all_agree(False)
        raise
    if not all_agree(True):
        raise ValueError("another process could not go on; it said why")
    return made


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds in every process; all must ask."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _listen() -> None:
    if not all_agree(True):
        raise RuntimeError("process 0 could not go on; it said why")
