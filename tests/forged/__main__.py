"""Changes signed packages, signatures, registries and logs, and sees whether the verifier notices.

    python -m tests.forged --count 4000 --seed 0

Each attempt changes one thing in a copy of a small world of signed packages, as somebody could who
lacks the keys that it would take. It must be refused in one plain sentence, or change nothing that
the verifier concludes: the same packages, byte for byte, signed by the same signers, by the same
registry. Spaces in a signature's JSON change nothing, and neither does the second of the two forms
that every ECDSA signature has.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import logs, packages, registries, signatures
from .world import World, make_world

# What is changed: a module with `PARTS`, the files and folders that its changes may touch;
# `change(draw, world)`, which says what it did; and `conclusion(world)`, what the verifier makes of
# it.
TARGETS = {"package": packages, "signature": signatures, "registry": registries, "log": logs}


def restore(original: Path, folder: Path, parts: tuple[str, ...]) -> None:
    """Copies parts of the original world again, in place of what an attempt left of them."""
    for path in [*(folder / part for part in parts), *folder.glob("*.moved")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for part in parts:
        copy = shutil.copytree if (original / part).is_dir() else shutil.copy
        copy(original / part, folder / part)


class Hangs(Exception):
    """The verifier took too long; no OSError, which would be a refusal."""


def too_slow(*_: object) -> None:
    raise Hangs


def attempt(
    original: Path, folder: Path, number: int, expected: dict[str, Any], seconds: int
) -> tuple[str, str, str]:
    """Makes change `number`; `expected` are the conclusions from the unchanged world.

    Returns:
      the target; what was changed; "refused", "same meaning", or what went wrong.
    """
    draw = random.Random(number)
    name = list(TARGETS)[number % len(TARGETS)]
    target = TARGETS[name]
    world = World(folder)
    what = target.change(draw, world)
    signal.alarm(seconds)
    try:
        found = target.conclusion(world)
    except (ValueError, OSError) as error:
        told = str(error) and "Traceback" not in str(error)
        return name, what, "refused" if told else "refused without a reason"
    except Hangs:
        return name, what, "hangs"
    except Exception as error:
        return name, what, f"not refused in a plain sentence: {error!r}"
    finally:
        signal.alarm(0)
        restore(original, folder, target.PARTS)
    return name, what, "same meaning" if found == expected[name] else "ACCEPTED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--only", type=int, help="this attempt alone, as a report names it")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, too_slow)
    started, outcomes, wrong = time.perf_counter(), Counter(), 0
    with tempfile.TemporaryDirectory() as root:
        original, copy = Path(root) / "original", Path(root) / "copy"
        make_world(original)
        shutil.copytree(original, copy)
        expected = {name: target.conclusion(World(copy)) for name, target in TARGETS.items()}
        first = args.seed * 1_000_000 + 1
        numbers = range(first, first + args.count) if args.only is None else [args.only]
        for number in numbers:
            target, what, outcome = attempt(original, copy, number, expected, args.seconds)
            outcomes[target, outcome] += 1
            if outcome not in ("refused", "same meaning") or args.only is not None:
                wrong += outcome not in ("refused", "same meaning")
                print(f"{number}: {target}: {what}: {outcome}", flush=True)
    for (target, outcome), count in sorted(outcomes.items()):
        print(f"{target}: {count} {outcome}")
    seconds = time.perf_counter() - started
    print(f"{len(numbers)} attempts; {wrong} faults; {seconds:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
