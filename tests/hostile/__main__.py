"""Changes packages, merged models and ledgers, and sees what the commands make of them.

    python -m tests.hostile --count 1000 --seed 0

Each change is made to a small model, and merge, experts add, load, inspect, privacy verify and
privacy budget are given it. Nothing may be accepted that changes a logit, or that another command
refuses; each refusal is one line; nothing takes longer than 20 seconds (--seconds, for a machine
that does other work too).

What is sealed again by its own author is another package, and may be merged as such. Under a model
that was merged before, or beside experts that were trained before, nothing may take its place.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .attempts import make_world, work


class Worker:
    """A process that makes attempts; a new one in its place if it hangs or dies."""

    def __init__(self, world: Path, seconds: float):
        self.world, self.seconds = world, seconds
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.world), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        if self.ours.recv() != "ready":
            raise RuntimeError("the unchanged model is refused")

    def faults(self, number: int) -> tuple[str, list[str], bool]:
        """What was changed, what went wrong, and whether every command refused it."""
        self.ours.send(number)
        what = f"attempt {number}"
        while True:
            try:
                if not self.ours.poll(self.seconds):
                    raise TimeoutError
                found = self.ours.recv()
            except (EOFError, TimeoutError) as error:
                how = "hangs" if isinstance(error, TimeoutError) else "ends the process"
                self.process.kill()
                self.process.join()
                self.start()
                return what, [how], False
            if isinstance(found, tuple):
                return found
            what = found  # it continues with the next command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", type=int, help="this attempt alone, as a report names it")
    args = parser.parse_args()
    started, outcomes, wrong = time.perf_counter(), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        make_world(world)
        worker = Worker(world, args.seconds)
        first = args.seed * 1_000_000 + 1
        numbers = range(first, first + args.count) if args.only is None else [args.only]
        for number in numbers:
            what, faults, refused = worker.faults(number)
            outcomes["refused by all" if refused else "accepted by some"] += 1
            for fault in faults:
                wrong += 1
                print(f"{number}: {what}: {fault}", flush=True)
        worker.process.kill()
    counts = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    print(
        f"{len(numbers)} attempts: {counts}; {wrong} faults; {time.perf_counter() - started:.0f} s"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
