"""Each side runs in a process of its own; the two take turns, so that both see the same machine."""

import contextlib
import importlib
import multiprocessing
import os
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.cases import Side
from benchmarks.sizes import Size
from flexolmo_jax.runtime.startup import keep_freed_memory, leave_libtpu_alone, with_large_pages

CONTEXT = multiprocessing.get_context("spawn")


class Running:
    """A process that holds one side of a case, and runs it when told to."""

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
        peak = self._answer()
        self.process.join()
        return {"seconds": self.seconds, "first": self.first, "peak_bytes": peak}

    def _answer(self):
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"a benchmark process ended: {self.side.label}; see above") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def compare(sides: list[Side], size: Size, rounds: int) -> dict[str, dict[str, Any]]:
    """Runs all sides in turn: A B A B ...

    Args:
      sides: of one case.
      size: of the model and the work.
      rounds: timed runs of each side.

    Returns:
      for each label: seconds of each timed run; seconds to build and run for the first time;
      resident memory of the process, at its largest, in bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # of what the sides write
        running = [Running(side, size) for side in sides]
        for _ in range(rounds):
            for one in running:
                one.run()
        return {side.label: one.end() for side, one in zip(sides, running, strict=True)}


@contextlib.contextmanager
def _environment(side: Side):
    """Ours runs as `flexolmo train` does, the peer as it is; large pages make it slower."""
    before = dict(os.environ)
    if side.module == "benchmarks.ours":
        os.environ.update(with_large_pages())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Connection, side: Side, size: Size) -> None:
    try:
        start = time.perf_counter()
        if side.module == "benchmarks.ours":
            leave_libtpu_alone()  # as the command line does, before JAX is imported
            keep_freed_memory()  # and before any thread starts
        build = importlib.import_module(side.module).build
        run = build(side.case, size, side.option)
        run()
        first = time.perf_counter() - start
        run()  # before it says so, or it would go on beside the others' timed runs
        connection.send(first)
        while connection.recv() == "run":
            start = time.perf_counter()
            run()
            connection.send(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        connection.send(peak)
    except Exception as error:
        connection.send(error)
        raise
    os._exit(0)  # neither library needs to be taken down in order
