"""Standard tasks through lm-evaluation-harness (the extra `harness`).

The harness builds the prompts and computes the metrics. `HarnessModel` answers its requests and
tokenizes text as the harness's adapter for Hugging Face models does (HFLM, one request a batch), so
that the scores of equal weights are equal.
"""

import contextlib
import logging
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

try:
    import lm_eval.utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
except ImportError as error:
    raise ValueError(
        "standard tasks need one more package: in a clone of flexolmo_jax, run "
        "pip install -e '.[harness]'"
    ) from error

from flexolmo_jax.evaluation.harness_tasks import FEWSHOT_SEED, hub_access, load_tasks
from flexolmo_jax.evaluation.likelihood import Query, at_least, likelihoods
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.runtime.console import progress

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its own tasks cause warnings
ANSWER_TOKENS = 256  # where a task does not set a length; as in HFLM
BATCH_TOKENS = 8192  # of prompts and answers in a batch, roughly
MAX_PROMPTS = 64  # in a batch
SEED = 0  # as in lm_eval.simple_evaluate
BOOTSTRAP = 1000  # resamples, for the standard errors of metrics that are not means


class HarnessModel(TemplateLM):
    """A FlexOlmo, or some of its experts, behind lm-evaluation-harness's interface of a model.

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
        """Token ids; by default with the tokenizer's first token, unless the text begins with it.

        A task's text that spells a control token is encoded as that token, as the adapter for
        Hugging Face models does; everywhere else in this project it is encoded as its characters.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._text.separator_text)
        return self._text.encode_as_transformers(string, opened=add_special_tokens)

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As `TemplateLM`, which splits the tokens, but with our progress bar only."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **kwargs: Any) -> list[tuple[float, bool]]:
        queries = [Query(context, continuation) for _, context, continuation in requests]
        with progress("log-likelihoods", len(queries)) as bar:
            found = likelihoods(self._flexolmo, queries, **self._masks, advance=bar.advance)
        return [(answer.nats, answer.greedy) for answer in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts in nats, in windows of the model's maximum length."""
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
        """Continues prompts until one of their stop texts, the end of the text, or a length."""
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
                group.sort(key=lambda request: len(request[1]), reverse=True)
                while group:
                    longest = len(group[0][1]) + group[0][2].length
                    size = max(1, min(MAX_PROMPTS, at_least(BATCH_TOKENS // longest + 1, 2) // 2))
                    batch, group = group[:size], group[size:]
                    texts = self._answer(batch, len(group))
                    for (number, _, _), text in zip(batch, texts, strict=True):
                        answers[number] = text
                    bar.advance(len(batch))
        return answers

    def _answer(self, batch: list[tuple[int, list[int], "_Generation"]], seed: int) -> list[str]:
        how = batch[0][2]
        generated = self._flexolmo.generate(
            [prompt for _, prompt, _ in batch], how.length, **self._masks, until=how.until,
            temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, seed=seed,
        )  # fmt: skip
        # Decoded without the prompt, as the adapter does: SentencePiece-like tokenizers then drop a
        # leading space.
        texts = [self._text.decode(ids) for ids in generated]  # type: ignore[arg-type]
        for end in how.until:
            texts = [text.split(end)[0] for text in texts]
        return texts


class _Generation(NamedTuple):
    """The options of one request to generate an answer."""

    length: int
    until: tuple[str, ...]
    temperature: float
    top_k: int | None
    top_p: float | None


def _generation(request, separator: str) -> _Generation:
    options: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], ANSWER_TOKENS))
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
    """Scores a model on tasks, as lm-evaluation-harness computes them.

    Args:
      model: with a tokenizer.
      tasks: names of its tasks, groups or tags, or YAML files of tasks.
      without, only: experts to switch off, or the only ones to use.
      data: a folder that `fetch_task_data` filled; its data sets replace the hub's.
      limit: documents of each task; None is all.
      shots: examples in a prompt, for all or for some names; others keep the task's own number.
      download: whether the harness may download data sets from the Hugging Face hub.
      run_code: whether tasks may run the programs that the model writes, on this machine.

    Returns:
      the harness's own report: `results[name][metric]` of each task and group, `n-shot`,
      `n-samples`, `versions`, `group_subtasks` and `higher_is_better`.

    Raises:
      ValueError: a task is unknown or cannot be set up, its documents are missing, or as
        `HarnessModel`.
    """
    adapter = HarnessModel(model, without, only)
    random.seed(SEED)  # as lm_eval.simple_evaluate does, for equal results
    np.random.seed(FEWSHOT_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"  # it would fork beside JAX's threads
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric requires it, too
    no_bars = mock.patch("lm_eval.api.task.tqdm", lambda documents, **_: documents)  # 57 for MMLU
    with hub_access(download), no_bars, contextlib.redirect_stdout(sys.stderr):  # tasks may print
        loaded = load_tasks(tasks, data, shots)
        results = evaluate(
            adapter, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False,
            confirm_run_unsafe_code=run_code,
        )  # fmt: skip
    keys = ("results", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
    return {key: results[key] for key in keys}
