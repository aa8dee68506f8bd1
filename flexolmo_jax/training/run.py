"""The folder of a training run: what the run is, who works in it, and what came of it.

config.json    what the run was made from (`describe_run`); a run goes on only with the same
lock           held by the process that trains
result.json    the digest of the package that was written
data/ checkpoints/ metrics.jsonl ...
"""

import contextlib
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from flexolmo_jax.config import Training
from flexolmo_jax.federation.package import MANIFEST, read_manifest
from flexolmo_jax.runtime.endings import AlreadyDone
from flexolmo_jax.runtime.processes import is_main_process, on_main_process
from flexolmo_jax.storage.files import file_digest, replace_file
from flexolmo_jax.storage.locks import locked, private_folder

RUN_FILE = "config.json"
LOCK = "lock"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
# Fields of a config that change no weight: they may be another when a run goes on.
FREE = (
    "licence", "contact", "log_every", "checkpoint_every", "expert_parallel", "tensor_parallel",
    "microbatches", "remat", "expert_compute",
)  # fmt: skip
TOLD_IN_PACKAGE = ("name", "anchor", "licence", "contact")

P = ParamSpec("P")
R = TypeVar("R")


def describe_run(training: Training, **made_from: Any) -> dict[str, Any]:
    """What a run is, as JSON values: its config, and the digests of what it starts from.

    Text is described by its content (`source` in `made_from`); where it is (`source_at`) is kept
    for messages only. Files that the config names are described by their content too. What
    changes no weight is left out.
    """
    values = {**dataclasses.asdict(training), **made_from}
    for name in FREE:
        del values[name]
    values["data"].pop("source")
    for name in ("tokenizer", "domain_embedding"):
        if values.get(name) is not None and Path(values[name]).is_file():
            values[name] = file_digest(Path(values[name]))
    return json.loads(json.dumps(values))


def check_run(
    folder: Path, wanted: dict[str, Any], resume: bool, training: Training, out: Path | None = None
) -> None:
    """Checks that a run may start, or go on, in a folder.

    Args:
      folder: of the run.
      wanted: `describe_run`.
      resume: whether to go on was asked for.
      training: the config, for what the package says beside `wanted`.
      out: the package that the run writes.

    Raises:
      ValueError: there is a run and `resume` was not asked for, or it is another one; or there is
        a package that is not the one that was asked for.
      AlreadyDone: the run is at its end, and its package is written.
    """
    file = folder / RUN_FILE
    finished = out is not None and (out / MANIFEST).exists()
    if not file.exists():
        if finished and resume:
            raise ValueError(
                f"{out}: already there, and {folder} does not say what it was made from, so "
                "whether it is what was asked for is not known; choose another --out, or take it "
                "away first"
            )
        return
    if not resume:
        raise ValueError(
            f"{folder}: a run is there already; continue it with --resume, or take it away"
        )
    _check_same(folder, wanted, json.loads(file.read_text()))
    if finished:
        assert out is not None
        _check_result(folder, out, {**dataclasses.asdict(training), **wanted})
        raise AlreadyDone(f"{out}: already done")


def _check_same(folder: Path, wanted: dict[str, Any], there: dict[str, Any]) -> None:
    if "contact" in there:  # now in FREE
        raise ValueError(
            f"{folder}: an older version of flexolmo_jax started this run, and recorded its text "
            "by path and time, not by content; finish it with that version, or start anew in "
            "another --run"
        )
    ours, theirs = _flat(wanted), _flat(there)
    for name in sorted(ours.keys() | theirs.keys()):
        if name == "source_at" or ours.get(name) == theirs.get(name):
            continue
        if name == "source":
            raise ValueError(
                f"{folder}: cannot resume with another text: what is in {wanted['source_at']} is "
                f"not what was in {there.get('source_at')} when this run was started"
            )
        raise ValueError(
            f"{folder}: cannot resume with another {name}: it was {theirs.get(name)}, now "
            f"{ours.get(name)}"
        )


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested fields under names as on the command line: data.length."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat


def _check_result(folder: Path, out: Path, asked: dict[str, Any]) -> None:
    """Raises ValueError if a package is not what this run has made, or not what is asked for."""
    manifest = read_manifest(out)
    for name in TOLD_IN_PACKAGE:
        if name in asked and asked[name] != manifest.get(name, asked[name]):
            raise ValueError(
                f"{out}: already there, with another {name}: it is {manifest[name]}, asked for is "
                f"{asked[name]}; choose another --out, or take it away first: --resume then "
                "writes it again"
            )
    result = folder / RESULT
    if result.exists():
        same = json.loads(result.read_text())["digest"] == manifest["digest"]
    else:  # killed after the package was written, and before that was recorded
        same = (folder / CHECKPOINTS / str(asked["steps"])).is_dir()
    if not same:
        raise ValueError(
            f"{out}: already there, and not the package that the run in {folder} has made; choose "
            "another --out, or take it away first"
        )


def record_run(folder: Path, wanted: dict[str, Any]) -> None:
    """Writes down what a run is; from then on it has to be resumed, or taken away."""
    if is_main_process():
        private_folder(folder)
        replace_file(folder / RUN_FILE, json.dumps(wanted, indent=1) + "\n")


def alone_in_its_run(stage: Callable[P, R]) -> Callable[P, R]:
    """A training function that lets no other process work in its run folder.

    Of several processes of one distributed run, the first one holds the lock. When the stage has
    written its package, that is recorded in the folder.

    Args:
      stage: has an argument `run`, and may have `out`.
    """
    signature = inspect.signature(stage)

    @functools.wraps(stage)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        run, out = Path(given["run"]), given.get("out")
        with contextlib.ExitStack() as stack:
            on_main_process(lambda: stack.enter_context(_held(run)))
            made = stage(*args, **kwargs)
            if is_main_process() and out is not None and (Path(out) / MANIFEST).exists():
                digest = read_manifest(Path(out))["digest"]
                replace_file(run / RESULT, json.dumps({"digest": digest}) + "\n")
            return made

    return alone


@contextlib.contextmanager
def _held(run: Path) -> Iterator[None]:
    """The run folder, made if it is missing, and locked; gone again if nothing came into it."""
    is_ours = private_folder(run)
    try:
        with locked(
            run / LOCK, "is training in this run folder",
            "wait until it has ended, or stop it; two would overwrite each other's checkpoints",
        ):  # fmt: skip
            yield
    finally:
        if is_ours:
            with contextlib.suppress(OSError):
                run.rmdir()
