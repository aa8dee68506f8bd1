"""Commands that a study runs in processes of their own, as an owner would."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexolmo_jax.data.sources import fingerprint
from flexolmo_jax.federation.package import MANIFEST
from flexolmo_jax.studies.engine.stages import Stage

PACKAGE = "package"  # in a stage's folder: the package that a training wrote
RUN = "run"  # and the folder of the training run


def run_command(
    arguments: Sequence[str],
    *,
    compiled: Path | None = None,
    environment: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> None:
    """Runs `flexolmo ARGUMENTS` in a process of its own.

    Args:
      arguments: the words of the command line.
      compiled: folder of compiled programs, so that equal programs are compiled once.
      environment: variables to add to those of this process.
      quiet: do not show what the command prints.

    Raises:
      RuntimeError: the command failed.
    """
    variables = {**os.environ, **(environment or {})}
    if compiled is not None:
        variables["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    command = [sys.executable, "-m", "flexolmo_jax", *arguments]
    done = subprocess.run(command, env=variables, capture_output=quiet, text=True)
    if done.returncode:
        raise RuntimeError(f"flexolmo {' '.join(arguments)} failed: {done.stderr or 'see above'}")


def training_stage(
    name: str,
    root: Path,
    words: Sequence[str],
    reads: Mapping[str, tuple[Stage, str]] | None = None,
    *,
    data: str | None = None,
    is_private: bool = False,
) -> Stage:
    """A stage that runs `flexolmo train` and leaves FOLDER/package and FOLDER/run.

    Args:
      name, root: as in `Stage`.
      words: of the command after `train`, without those below.
      reads: what the command reads of other stages: a file of a stage's folder, by option.
      data: the training text, for --data; the stage depends on its content, not on its path.
      is_private: the run has a privacy ledger and state of its own, FOLDER/budget.json and
        FOLDER/state. Otherwise a text has one ledger; but nothing of a study is published.
    """
    reads = reads or {}

    def work(folder: Path) -> None:
        if (folder / PACKAGE / MANIFEST).exists():  # interrupted after the package was written
            return
        inputs = {option: stage.folder / file for option, (stage, file) in reads.items()}
        outputs = {"--out": folder / PACKAGE, "--run": folder / RUN}
        environment = {}
        if is_private:
            outputs["--dp-ledger"] = folder / "budget.json"
            environment["XDG_STATE_HOME"] = str(folder / "state")
        named = {**({"--data": data} if data else {}), **inputs, **outputs}
        options = [str(word) for option in named.items() for word in option]
        run_command(
            ["train", *words, *options, "--resume"],
            compiled=root / "compiled", environment=environment,
        )  # fmt: skip

    made_from = {"words": list(words), "data": data and fingerprint(data)}
    needs = tuple(dict.fromkeys(stage for stage, _ in reads.values()))
    return Stage(name, root, made_from, needs, work)
