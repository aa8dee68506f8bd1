"""What `flexolmo evaluate --harness` does and shows."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.evaluation.suite import ALL, COLUMNS, PaperTask, chosen, column_scores
from flexolmo_jax.model import load
from flexolmo_jax.runtime.console import print_json, show_table, tell


def evaluate_harness(args: argparse.Namespace) -> None:
    """Runs the tasks that are named, and prints scores: a table, or with --json all there is.

    Raises:
      ValueError: nothing to run, or as `evaluate_tasks`.
    """
    from flexolmo_jax.evaluation.harness import evaluate_tasks

    paper = chosen(args.harness)
    runs = [task for task in paper if task.can_run(args.run_code)]
    names = [name for name in args.harness if name not in (ALL, *COLUMNS)]
    names += [task.task for task in runs if task.task and task.task not in names]
    left_out = [task for task in paper if task not in runs]
    if not names:
        reasons = "; ".join(f"{task.name} needs {task.needs}" for task in left_out)
        raise ValueError(f"none of {' '.join(args.harness)} can be run: {reasons}")
    shots: Any = args.shots
    if shots is None:
        shots = {task.task: task.shots for task in runs}
    found = evaluate_tasks(
        load(args.model, anchor=args.anchor, dtype=args.dtype, separator=args.separator), names,
        without=args.without, only=args.only, data=args.task_data and Path(args.task_data),
        limit=args.limit, shots=shots, download=args.download, run_code=args.run_code,
    )  # fmt: skip
    columns = column_scores(paper, found["results"])
    if args.json:
        asked = {"model": args.model, "without": args.without, "only": args.only}
        missing = {task.name: task.needs for task in left_out}
        whole = {**asked, "limit": args.limit, **found, "columns": columns, "not_run": missing}
        print_json(whole)
        return
    _show(found)
    if paper:
        _show_columns(columns, paper)
    for task in left_out:
        tell(f"{task.name} was not run; it needs {task.needs}")


def _show(found: Mapping[str, Any]) -> None:
    groups = found["group_subtasks"]
    inner = {task for tasks in groups.values() for task in tasks}
    rows = []
    for name, entry in found["results"].items():
        for metric, value in entry.items():
            short, _, kind = metric.partition(",")
            if name in inner or not kind or short.endswith("_stderr"):
                continue
            error = entry.get(f"{short}_stderr,{kind}")
            shots = {found["n-shot"][task] for task in _tasks_of(name, groups)}
            rows.append(
                {
                    "task": name,
                    "metric": short if kind == "none" else f"{short} ({kind})",
                    "score": f"{value:.4f}",
                    "standard error": f"{error:.4f}" if isinstance(error, float) else "",
                    "documents": entry["sample_len"],
                    "examples": " to ".join(map(str, sorted({min(shots), max(shots)}))),
                }
            )
    show_table(rows)


def _tasks_of(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group and of its groups; a task itself."""
    if name not in groups:
        return [name]
    return [task for child in groups[name] for task in _tasks_of(child, groups)]


def _show_columns(columns: Mapping[str, float | None], paper: Sequence[PaperTask]) -> None:
    rows = []
    for column, score in columns.items():
        tasks = ", ".join(task.name for task in paper if task.column == column)
        rows.append(
            {"column": column, "score": "" if score is None else f"{score:.1f}", "tasks": tasks}
        )
    show_table(rows, title="as the columns of the paper's table 2")
