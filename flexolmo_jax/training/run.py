"""The folder of a training run: its description, its lock, and its result.

config.json    what the run starts from (`describe_run`); only the same run may be resumed
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
from flexolmo_jax.data.sources import fingerprint
from flexolmo_jax.federation.package import MANIFEST, read_manifest
from flexolmo_jax.runtime.endings import AlreadyDone
from flexolmo_jax.runtime.processes import is_main_process, on_main_process
from flexolmo_jax.storage.files import file_digest, replace_file
from flexolmo_jax.storage.locks import locked, private_folder

RUN_FILE = "config.json"
LOCK = "lock"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
# Fields of a config that change no weight: they may differ when a run is resumed.
RESUMABLE_FIELDS = (
    "licence", "contact", "log_every", "checkpoint_every", "expert_parallel", "tensor_parallel",
    "microbatches", "remat", "expert_compute",
)  # fmt: skip
# Values of fields that did not exist when an older version started a run.
BEFORE_THE_FIELD = {"optimizer.name": "adamw", "head_rank": 0, "evidence_rank": 0, "ffn_rank": 0}
FIELDS_IN_MANIFEST = ("name", "anchor", "licence", "contact")

P = ParamSpec("P")
R = TypeVar("R")


def describe_run(training: Training, data: str | None = None, **inputs: Any) -> dict[str, Any]:
    """A run as JSON values: its config, and the digests of what it starts from.

    Text and files are described by their content. Fields that change no weight are left out.

    Args:
      training: the config.
      data: the text; its path is recorded too, for messages.
      inputs: whatever else decides the weights, by name.
    """
    if data is not None:
        inputs |= {"source": fingerprint(data), "source_at": data}
    values = {**dataclasses.asdict(training), **inputs}
    for name in RESUMABLE_FIELDS:
        del values[name]
    values["data"].pop("source")
    for name in ("tokenizer", "domain_embedding"):
        if values.get(name) is not None and Path(values[name]).is_file():
            values[name] = file_digest(Path(values[name]))
    return json.loads(json.dumps(values))


def package_facts(training: Training, **more: Any) -> dict[str, Any]:
    """What the manifest of a trained package says about its training."""
    return {
        "tokens_seen": training.steps * training.data.batch_size * training.data.length,
        "domain_embedding": None,
        "licence": training.licence,
        "contact": training.contact,
        "heldout": training.data.split(),
        **more,
    }


def check_run(
    folder: Path, wanted: dict[str, Any], resume: bool, training: Training, out: Path | None = None
) -> None:
    """Checks that a run may start in a folder, or be resumed.

    Args:
      folder: of the run.
      wanted: the run to start or resume (`describe_run`).
      resume: whether the user asked to resume.
      training: the config, for the fields of the manifest that `wanted` does not have.
      out: the package that the run writes.

    Raises:
      ValueError: the folder holds a run, and `resume` is false or the run is a different one; or
        `out` exists and is not the package of this run.
      AlreadyDone: the run has ended, and its package is written.
    """
    file = folder / RUN_FILE
    finished = out is not None and (out / MANIFEST).exists()
    if not file.exists():
        if finished and resume:
            raise ValueError(
                f"{out} already exists, and {folder} does not say how it was made, so it may be a "
                "different package; choose another --out, or delete it first"
            )
        return
    if not resume:
        raise ValueError(
            f"{folder}: a run already exists here; pass --resume to continue it, or delete the "
            "folder"
        )
    _check_same(folder, wanted, json.loads(file.read_text()))
    if finished:
        assert out is not None
        _check_result(folder, out, {**dataclasses.asdict(training), **wanted})
        raise AlreadyDone(f"{out}: already done")


def _check_same(folder: Path, wanted: dict[str, Any], started: dict[str, Any]) -> None:
    """Raises ValueError if the run that was started in a folder is not the wanted one."""
    # Older versions recorded the contact, or had other names for the values of gating.
    if "contact" in started or started.get("gating") in ("alone", "pair"):
        raise ValueError(
            f"{folder}: an older version of flexolmo_jax started this run; finish it with that "
            "version, or start a new run in another --run"
        )
    before, now = _flat(started), _flat(wanted)
    before = {name: x for name, x in BEFORE_THE_FIELD.items() if name in now} | before
    for name in sorted(before.keys() | now.keys()):
        if name == "source_at" or before.get(name) == now.get(name):
            continue
        if name == "source":
            raise ValueError(
                f"{folder}: cannot resume with another text: {wanted['source_at']} does not hold "
                f"the text that {started.get('source_at')} held when this run started"
            )
        raise ValueError(
            f"{folder}: cannot resume with another {name}: it was {before.get(name)}, now "
            f"{now.get(name)}"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under their names on the command line: data.length."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _check_result(folder: Path, out: Path, wanted: dict[str, Any]) -> None:
    """Raises ValueError if a package is not this run's, or its manifest not the wanted one."""
    manifest = read_manifest(out)
    for name in FIELDS_IN_MANIFEST:
        if name in wanted and wanted[name] != manifest.get(name, wanted[name]):
            raise ValueError(
                f"{out} already exists with another {name}: expected {wanted[name]}, found "
                f"{manifest[name]}; choose another --out, or delete it first: --resume then writes "
                "it again"
            )
    result = folder / RESULT
    if result.exists():
        same = json.loads(result.read_text())["digest"] == manifest["digest"]
    else:  # killed after it wrote the package and before it recorded that
        same = (folder / CHECKPOINTS / str(wanted["steps"])).is_dir()
    if not same:
        raise ValueError(
            f"{out} already exists and is not the package of the run in {folder}; choose another "
            "--out, or delete it first"
        )


def record_run(folder: Path, wanted: dict[str, Any]) -> None:
    """Writes the description of a run; from then on, it can only be resumed or deleted."""
    if is_main_process():
        private_folder(folder)
        replace_file(folder / RUN_FILE, json.dumps(wanted, indent=1) + "\n")


def alone_in_its_run(stage: Callable[P, R]) -> Callable[P, R]:
    """Decorates a training function so that only one process trains in a run folder.

    In a distributed run, the main process holds the lock. When the stage has written its package,
    its digest is recorded in the folder.

    Args:
      stage: a function with an argument `run`, and perhaps `out`.
    """
    signature = inspect.signature(stage)

    @functools.wraps(stage)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = signature.bind(*args, **kwargs).arguments
        run, out = Path(arguments["run"]), arguments.get("out")
        with contextlib.ExitStack() as stack:
            on_main_process(lambda: stack.enter_context(_locked_folder(run)))
            result = stage(*args, **kwargs)
            if is_main_process() and out is not None and (Path(out) / MANIFEST).exists():
                digest = read_manifest(Path(out))["digest"]
                replace_file(run / RESULT, json.dumps({"digest": digest}) + "\n")
            return result

    return alone


@contextlib.contextmanager
def _locked_folder(run: Path) -> Iterator[None]:
    """Creates and locks a run folder; deletes it again if it stays empty."""
    created = private_folder(run)
    try:
        with locked(
            run / LOCK, "is training in this run folder",
            "wait until it ends, or stop it; two would overwrite each other's checkpoints",
        ):  # fmt: skip
            yield
    finally:
        if created:
            with contextlib.suppress(OSError):
                run.rmdir()
