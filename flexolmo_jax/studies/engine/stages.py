"""The stages of a study: each made once, and kept under a digest of all that it is made from.

A stage's folder is named after its inputs and those of the stages it needs, never after code. So a
changed value makes anew what depends on it and nothing else, going back to an old value finds the
old result, and what was killed half way is taken up again. Several processes may work on the
stages of one folder.
"""

import dataclasses
import fcntl
import functools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.runtime.console import log
from flexolmo_jax.storage.files import canonical_digest, replace_file

DONE = "done.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One step of a study.

    Attributes:
      name: of the step, as "seed0/anchor"; unique in a study.
      root: the study's folder.
      made_from: JSON value of all that decides the result, beside the needed stages.
      needs: stages whose folders `work` reads.
      work: fills the stage's folder; called again, with what is there, after a kill.
    """

    name: str
    root: Path
    made_from: Any
    needs: tuple["Stage", ...]
    work: Callable[[Path], None]

    @functools.cached_property
    def digest(self) -> str:
        """Of the inputs and of what they depend on in turn."""
        needed = [(need.name, need.digest) for need in self.needs]
        return canonical_digest({"made_from": self.made_from, "needs": needed})

    @functools.cached_property
    def folder(self) -> Path:
        return self.root / f"{self.name}-{self.digest[:12]}"

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE).exists()

    @property
    def seconds(self) -> float:
        """How long it took, without attempts that were killed."""
        return json.loads((self.folder / DONE).read_text())["seconds"]


def run_stages(stages: Sequence[Stage]) -> None:
    """Runs what is not done yet, in order.

    Args:
      stages: each after those it needs.

    Raises:
      what a stage's work raises; earlier stages are kept, and the next call goes on there.
    """
    waiting = [stage for stage in stages if not stage.is_done]
    if len(waiting) < len(stages):
        log(f"{len(stages) - len(waiting)} of {len(stages)} stages are done already")
    started = time.monotonic()
    for number, stage in enumerate(waiting, 1):
        passed = time.monotonic() - started
        title = f"[{number}/{len(waiting)}] {stage.name} (after {passed / 60:.1f} min)"
        log(title)
        stage.folder.mkdir(parents=True, exist_ok=True)
        with open(stage.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it, for another seed
            if not stage.is_done:
                _run(stage)


def _run(stage: Stage) -> None:
    begun = time.monotonic()
    stage.work(stage.folder)
    facts = {
        "name": stage.name,
        "made_from": stage.made_from,
        "needs": [str(need.folder.relative_to(stage.root)) for need in stage.needs],
        "seconds": round(time.monotonic() - begun, 2),
    }
    replace_file(stage.folder / DONE, json.dumps(facts, indent=1) + "\n")


def forget(folder: Path) -> None:
    """Takes away what only an unfinished stage needs, as the checkpoints of its training."""
    shutil.rmtree(folder, ignore_errors=True)
