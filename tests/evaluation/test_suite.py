"""The paper's tasks: all of them, as lm_eval has them, and as the document lists them."""

from pathlib import Path

from flexolmo_jax.corpora.tasks import SOURCES
from flexolmo_jax.evaluation.harness_tasks import task_manager
from flexolmo_jax.evaluation.suite import COLUMNS, SUITE, PaperTask, chosen, column_scores

DOCUMENT = Path(__file__).parents[2] / "docs" / "tasks.md"


def test_they_are_the_papers_31():
    counts = {column: len(chosen([column])) for column in COLUMNS}
    assert counts == {
        "MC9": 9, "GEN5": 5, "MMLU": 1, "MMLU-Pro": 1, "AGIEval": 1, "BBH": 1, "Math2": 2,
        "NewsG": 1, "PoemG": 1, "SciRIFF5": 5, "Code4": 4,
    }  # fmt: skip
    assert len(chosen(["paper"])) == 31 and chosen(["paper", "MC9"]) == SUITE
    assert chosen(["hellaswag"]) == ()
    assert {task.task for task in SUITE if task.in_package} == {*SOURCES, "mmlu"}


def test_the_harness_has_them_with_these_metrics():
    index = task_manager().task_index
    for task in SUITE:
        if task.task is None:
            assert task.needs
            continue
        config = index[task.task].cfg
        metric, _, kind = task.metric.partition(",")
        if "class" in config:  # a task in Python
            continue
        listed = config.get("aggregate_metric_list") or config.get("metric_list")
        names = [
            str(one["metric"]).rpartition(".")[2].replace("pass_at_k", "pass@1") for one in listed
        ]
        assert metric in names, task
        filters = config.get("filter_list") or listed[names.index(metric)].get("filter_list")
        if isinstance(filters, list):
            filters = [one["name"] for one in filters]
        assert kind in (filters or "none"), task


def test_the_document_lists_them():
    text = DOCUMENT.read_text()
    for task in SUITE:
        where = "" if task.task is None else "here" if task.in_package else "hub"
        shots = "" if task.task is None else "fixed" if task.shots is None else task.shots
        named = (f"`{task.task}`", task.metric) if task.task else ("", "")
        said = "; ".join(x for x in (task.differs, task.needs and f"needs {task.needs}") if x)
        cells = (task.column, task.name, *named, shots, where, said)
        assert f"| {' | '.join(map(str, cells))} |\n" in text


def test_what_can_be_run():
    def names(run_code):
        return {task.name for task in SUITE if task.can_run(run_code)}

    assert names(True) - names(False) == {task.name for task in chosen(["Code4"])}
    assert {"ARC-E", "MMLU", "GSM8K"} < names(False) and not {"NewsG", "COVID-QA"} & names(True)
    assert not PaperTask("X", "x", "x", module="json.nothing").can_run(False)
    assert not PaperTask("X", "x", "x", module="nowhere.nothing").can_run(False)


def test_scores_of_columns():
    tasks = chosen(["Math2", "MMLU", "NewsG"])
    results = {
        "gsm8k_cot": {"exact_match,flexible-extract": 0.25},
        "minerva_math": {"exact_match,none": 0.75},
        "mmlu": {"acc,other": 0.5},
    }
    assert column_scores(tasks, results) == {"MMLU": None, "Math2": 50.0, "NewsG": None}
