"""The stages of a study: each runs once, and its result is stored under a digest of its inputs.

A stage's folder is named after its inputs and those of the stages it needs, never after code. So
changing an input re-runs exactly the stages that depend on it, changing it back finds the old
result, and an interrupted stage is resumed. Several processes may work on the stages of one folder.
"""

import dataclasses
import fcntl
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.runtime.console import log
from flexolmo_jax.storage.files import canonical_digest, replace_file

DONE = "done.json"
RESULT = "result.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One step of a study.

    Attributes:
      name: such as "seed0/anchor"; unique in a study.
      root: the study's folder.
      made_from: JSON value of all that decides the result, beside the needed stages.
      needs: stages whose folders `work` reads.
      work: fills the stage's folder; after an interruption it is called again with what the folder
        already holds.
    """

    name: str
    root: Path
    made_from: Any
    needs: tuple["Stage", ...]
    work: Callable[[Path], None]

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of the stage's inputs and, through their digests, of all it depends on."""
        needed = [(need.name, need.digest) for need in self.needs]
        return canonical_digest({"made_from": self.made_from, "needs": needed})

    @functools.cached_property
    def folder(self) -> Path:
        """Where the stage's result is, or will be."""
        return self.root / f"{self.name}-{self.digest[:12]}"

    @property
    def is_done(self) -> bool:
        """Whether the stage has run to its end."""
        return (self.folder / DONE).exists()

    @property
    def seconds(self) -> float:
        """How long the stage took, without interrupted attempts."""
        return json.loads((self.folder / DONE).read_text())["seconds"]

    @property
    def result(self) -> Any:
        """The value of a stage that `value_stage` made."""
        return json.loads((self.folder / RESULT).read_text())


def value_stage(
    name: str,
    root: Path,
    needs: Iterable[Stage],
    compute: Callable[[Path], Any],
    **made_from: Any,
) -> Stage:
    """A stage whose result is a JSON value, which `Stage.result` reads.

    Args:
      name, root, needs, made_from: as in `Stage`.
      compute: returns the value; it may use the stage's folder for what has to survive an
        interruption.
    """

    def work(folder: Path) -> None:
        replace_file(folder / RESULT, json.dumps(compute(folder), indent=1) + "\n")

    return Stage(name, root, made_from, tuple(needs), work)


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all that they need, each once and after those it needs."""
    ordered: dict[Path, Stage] = {}

    def add(stage: Stage) -> None:
        for need in stage.needs:
            add(need)
        ordered.setdefault(stage.folder, stage)

    for stage in stages:
        add(stage)
    return list(ordered.values())


def run_stages(stages: Sequence[Stage]) -> None:
    """Runs the stages that are not done yet, in order.

    Args:
      stages: each after those it needs.

    Raises:
      what a stage's work raises; earlier results are kept, and the next call resumes there.
    """
    waiting = [stage for stage in stages if not stage.is_done]
    if len(waiting) < len(stages):
        log(f"{len(stages) - len(waiting)} of {len(stages)} stages are done already")
    started = time.monotonic()
    for number, stage in enumerate(waiting, 1):
        minutes = (time.monotonic() - started) / 60
        log(f"[{number}/{len(waiting)}] {stage.name} (after {minutes:.1f} min)")
        stage.folder.mkdir(parents=True, exist_ok=True)
        with open(stage.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may run this stage, for another seed
            if not stage.is_done:
                _run(stage)


def _run(stage: Stage) -> None:
    started = time.monotonic()
    stage.work(stage.folder)
    facts = {
        "name": stage.name,
        "made_from": stage.made_from,
        "needs": [str(need.folder.relative_to(stage.root)) for need in stage.needs],
        "seconds": round(time.monotonic() - started, 2),
    }
    replace_file(stage.folder / DONE, json.dumps(facts, indent=1) + "\n")


def discard(folder: Path) -> None:
    """Deletes what only an unfinished stage needs, such as the checkpoints of its training."""
    shutil.rmtree(folder, ignore_errors=True)
