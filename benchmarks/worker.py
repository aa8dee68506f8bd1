"""Each side runs in a process of its own; the two take turns, so that both see the same machine."""

import multiprocessing
import os
import resource
import statistics
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

from benchmarks.sizes import Size

CONTEXT = multiprocessing.get_context("spawn")


class Measured(NamedTuple):
    """What one side needed for one case."""

    seconds: list[float]  # of each timed run
    first: float  # seconds to build and run for the first time; compiling is most of it
    peak_bytes: int  # resident memory of the process, at its largest

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Side:
    """A process that holds one case of one side, and runs it when told to."""

    def __init__(self, module: str, case: str, size: Size, option: str):
        self.connection, theirs = CONTEXT.Pipe()
        arguments = (theirs, module, case, size, option)
        self.process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.first = self._answer()
        self.seconds: list[float] = []

    def run(self) -> None:
        self.connection.send("run")
        self.seconds.append(self._answer())

    def end(self) -> Measured:
        self.connection.send("end")
        peak = self._answer()
        self.process.join()
        return Measured(self.seconds, self.first, peak)

    def _answer(self):
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError("a benchmark process ended; see above") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def compare(sides: list[tuple[str, str]], case: str, size: Size, rounds: int) -> list[Measured]:
    """Runs all sides in turn: A B A B ...

    Args:
      sides: (module with `build`, option) of each.
      case, size: what is run.
      rounds: timed runs of each side.
    """
    running = [Side(module, case, size, option) for module, option in sides]
    for _ in range(rounds):
        for side in running:
            side.run()
    return [side.end() for side in running]


def _serve(connection: Connection, module: str, case: str, size: Size, option: str) -> None:
    try:
        start = time.perf_counter()
        run = __import__(module, fromlist=["build"]).build(case, size, option)
        run()
        connection.send(time.perf_counter() - start)
        run()
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
