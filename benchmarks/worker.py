"""Runs each side in a process of its own, interleaved, so that all see the same machine."""

import contextlib
import importlib
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.cases import Side
from benchmarks.machine import resident
from benchmarks.sizes import Size
from flexolmo_jax.runtime.startup import with_large_pages

CONTEXT = multiprocessing.get_context("spawn")


class Running:
    """A process that runs one side of a case on request."""

    def __init__(self, side: Side, size: Size):
        self.side = side
        self.connection, theirs = CONTEXT.Pipe()
        arguments = (theirs, side, size)
        self.process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        with _environment(side):
            self.process.start()
        theirs.close()
        self.first = self._answer()
        self.seconds: list[float] = []

    def run(self) -> None:
        try:
            self.connection.send("run")
        except BrokenPipeError:
            raise RuntimeError(
                f"the process of {self.side.label} has ended; did the sides' memory suffice?"
            ) from None
        self.seconds.append(self._answer())

    def end(self) -> dict[str, Any]:
        self.connection.send("end")
        peak, libraries = self._answer()
        self.process.join()
        own = {"peak_bytes": peak, "library_bytes": libraries}
        return {"seconds": self.seconds, "first": self.first, **own}

    def _answer(self):
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"a benchmark process ended: {self.side.label}; see above") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def compare(sides: list[Side], size: Size, rounds: int) -> dict[str, dict[str, Any]]:
    """Runs all sides, interleaved: A B A B ...

    Args:
      sides: of one case.
      size: of the model and the work.
      rounds: timed runs of each side.

    Returns:
      for each label: "seconds" of each timed run, "first": seconds to build and run for the first
      time, "peak_bytes": the largest resident memory of the process, and "library_bytes": its
      resident memory once the libraries are imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # where the sides write
        running = [Running(side, size) for side in sides]
        for _ in range(rounds):
            for process in running:
                process.run()
        return {process.side.label: process.end() for process in running}


@contextlib.contextmanager
def _environment(side: Side):
    """Our sides run as `flexolmo train` does; large pages would make PyTorch slower."""
    before = dict(os.environ)
    if not side.is_pytorch:
        os.environ.update(with_large_pages())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Connection, side: Side, size: Size) -> None:
    try:
        start = time.perf_counter()
        importlib.import_module("benchmarks.pytorch" if side.is_pytorch else "benchmarks.flexolmo")
        libraries = resident("VmRSS")
        run = side.build(size)
        run()
        first = time.perf_counter() - start
        connection.send(first)
        while connection.recv() == "run":
            run()  # caches and memory have been those of the other sides
            start = time.perf_counter()
            run()
            connection.send(time.perf_counter() - start)
        connection.send((resident("VmHWM"), libraries))
    except Exception as error:
        connection.send(error)
        raise
    os._exit(0)  # neither library needs an orderly shutdown
