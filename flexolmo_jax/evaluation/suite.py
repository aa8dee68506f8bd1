"""The paper's 31 tasks (its section 4.2), by the columns of its table 2, in lm-evaluation-harness.

The paper used another harness, OLMES, so that prompts, examples and stop texts differ even where a
task has the same name; `differs` says what differs beyond that. Compare models with each other
here, not with the paper's numbers.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ALL = "paper"


class PaperTask(NamedTuple):
    """One of the 31.

    Attributes:
      column: of the paper's table 2; its score is the mean over its tasks.
      name: in the paper.
      task: in lm_eval; None where it has none.
      metric: of lm_eval, "metric,filter"; its group's where the task is one.
      shots: examples in a prompt, as in the paper; None keeps the number that the harness fixes.
      in_package: whether `flexolmo data tasks` downloads its documents.
      differs: how it differs from what the paper measured.
      needs: what it requires beyond documents and a model; empty for most tasks.
      module: the Python module without which the harness cannot set it up.
    """

    column: str
    name: str
    task: str | None
    metric: str = "acc,none"
    shots: int | None = 5
    in_package: bool = False
    differs: str = ""
    needs: str = ""
    module: str = ""

    def can_run(self, run_code: bool) -> bool:
        """Whether its requirements are met, documents aside; `run_code` permits programs."""
        if self.task is None or (self.needs == _RUNS and not run_code):
            return False
        try:
            return not self.module or importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # a parent package is missing
            return False


_CLOZE = "the harness scores the answers' texts, the paper a letter after all answers are listed"
_EXACT = "exact match; the paper has F1"
_CODE = "one greedy program; the paper samples 10 at temperature 0.8"
_RUNS = "--run-code: what the model writes is run on this machine"
_BIOASQ = "its documents, for which BioASQ asks to register; a task file of your own"
_JUDGE = "a judge (Llama-3.3-70B-Instruct, its own licence, about 140 GB); 5 samples, T = 0.8"

SUITE = (
    PaperTask("MC9", "ARC-E", "arc_easy", "acc_norm,none", 5, True, _CLOZE),
    PaperTask("MC9", "ARC-C", "arc_challenge", "acc_norm,none", 5, True, _CLOZE),
    PaperTask("MC9", "BoolQ", "boolq", "acc,none", 5, True, "all documents; the paper has 1,000"),
    PaperTask("MC9", "CSQA", "commonsense_qa", "acc,none", 5, True),
    PaperTask("MC9", "HellaSwag", "hellaswag", "acc_norm,none", 5, True, _CLOZE),
    PaperTask("MC9", "OBQA", "openbookqa", "acc_norm,none", 5, True, _CLOZE),
    PaperTask("MC9", "PIQA", "piqa", "acc_norm,none", 5, True, _CLOZE),
    PaperTask("MC9", "SIQA", "social_iqa", "acc,none", 5, True, _CLOZE),
    PaperTask("MC9", "WinoGrande", "winogrande", "acc,none", 5, True, _CLOZE),
    PaperTask(
        "GEN5", "CoQA", "coqa", "f1,none", 0,
        needs="transformers 4: the harness imports what 5 has no more",
        module="transformers.data.metrics.squad_metrics",
    ),
    PaperTask(
        "GEN5", "SQuAD", "squadv2", "HasAns_f1,none", 5, False,
        "F1 on SQuAD 2's answerable questions, which are SQuAD 1.1's",
    ),
    PaperTask("GEN5", "NQ", "nq_open", "exact_match,remove_whitespace", 5, True, _EXACT),
    PaperTask("GEN5", "TriviaQA", "triviaqa", "exact_match,remove_whitespace", 5, True, _EXACT),
    PaperTask("GEN5", "DROP", "drop", "f1,none", 5),
    PaperTask("MMLU", "MMLU", "mmlu", "acc,none", 5, True, "mean over documents, not subjects"),
    PaperTask(
        "MMLU-Pro", "MMLU-Pro", "mmlu_pro", "exact_match,custom-extract", 5, False,
        "the model reasons before it answers; the paper scores a letter",
    ),
    PaperTask("AGIEval", "AGIEval", "agieval_en", "acc,none", 1),
    PaperTask("BBH", "BBH", "bbh_cot_fewshot", "exact_match,get-answer", None),
    PaperTask("Math2", "GSM8K", "gsm8k_cot", "exact_match,flexible-extract", 8),
    PaperTask(
        "Math2", "MATH", "minerva_math", "exact_match,none", 4,
        needs="pip install 'lm_eval[math]'", module="math_verify",
    ),
    PaperTask("NewsG", "NewsG", None, needs=_JUDGE),
    PaperTask("PoemG", "PoemG", None, needs=_JUDGE),
    PaperTask("SciRIFF5", "BioASQ factoid", None, needs=_BIOASQ),
    PaperTask("SciRIFF5", "BioASQ general", None, needs=_BIOASQ),
    PaperTask("SciRIFF5", "BioASQ yes/no", None, needs=_BIOASQ),
    PaperTask("SciRIFF5", "COVID-QA", None, needs="a task file of your own: lm_eval has none"),
    PaperTask(
        "SciRIFF5", "PubMedQA", "pubmedqa", "acc,none", 5, False,
        "the harness's own prompt, not SciRIFF's",
    ),
    PaperTask("Code4", "MBPP", "mbpp", "pass_at_1,none", 3, False, _CODE, _RUNS),
    PaperTask("Code4", "MBPP+", "mbpp_plus", "pass_at_1,none", 3, False, _CODE, _RUNS),
    PaperTask("Code4", "HumanEval", "humaneval", "pass@1,create_test", 0, False, _CODE, _RUNS),
    PaperTask(
        "Code4", "HumanEval+", "humaneval_plus", "pass@1,create_test", 0, False, _CODE, _RUNS
    ),
)  # fmt: skip
COLUMNS = tuple(dict.fromkeys(task.column for task in SUITE))


def chosen(names: Sequence[str]) -> tuple[PaperTask, ...]:
    """The tasks of the named columns; all tasks for "paper"."""
    return tuple(task for task in SUITE if task.column in names or ALL in names)


def column_scores(
    tasks: Sequence[PaperTask], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, float | None]:
    """Scores of columns, 0 to 100; None where a task of the column was not run.

    Args:
      tasks: as `chosen` gives them.
      results: `results` of `evaluate_tasks`.
    """
    scores: dict[str, float | None] = {}
    for column in dict.fromkeys(task.column for task in tasks):
        values = [
            results[task.task].get(task.metric) if task.task and task.task in results else None
            for task in tasks
            if task.column == column
        ]
        known = [value for value in values if value is not None]
        is_complete = len(known) == len(values)
        scores[column] = 100 * sum(known) / len(known) if is_complete else None
    return scores
