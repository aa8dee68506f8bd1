"""`flexolmo evaluate`: bits per byte of texts, or scores in standard tasks."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_jax.commands.parser import Commands, check_text
from flexolmo_jax.commands.shared_arguments import SOURCE, add_heldout, add_model, load_model
from flexolmo_jax.runtime.console import print_json, show_table, tell

if TYPE_CHECKING:
    from flexolmo_jax.evaluation.suite import PaperTask

ONLY_WITH = {  # options that are for --data or --harness only
    "heldout": "data",
    "group_field": "data",
    "task_data": "harness",
    "limit": "harness",
    "shots": "harness",
    "download": "harness",
    "run_code": "harness",
}


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "evaluate",
        run,
        "compute bits per byte of texts, or scores in standard tasks",
        "Computes bits per byte of texts (--data), or scores in standard tasks (--harness).",
    )
    # Before Python 3.13, argparse does not break lines inside a group like this one.
    parser.usage = (
        "flexolmo evaluate [-h] --model DIR\n"
        "    (--data NAME=SOURCE ... | --harness TASK ...) [options]"
    )
    add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data",
        metavar="NAME=SOURCE",
        action="extend",
        nargs="+",
        help=f"texts, each under its own name; a source is a {SOURCE}",
    )
    what.add_argument(
        "--harness",
        metavar="TASK",
        action="extend",
        nargs="+",
        help="tasks of lm-evaluation-harness, your own YAML files, columns of the paper's table 2 "
        "(MC9, GEN5, ...), or paper for all columns",
    )
    texts = parser.add_argument_group("texts")
    add_heldout(
        texts,
        "only documents that training with this held-out share held out; without a value, the "
        "share in the manifest of the expert that is named NAME, or of all experts",
    )
    harness = parser.add_argument_group("tasks")
    harness.add_argument("--task-data", metavar="DIR", help="a folder of `flexolmo data tasks`")
    harness.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    harness.add_argument("--shots", type=int, metavar="N", help="examples in each prompt")
    harness.add_argument(
        "--download", action="store_true", help="get missing data from the Hugging Face hub"
    )
    harness.add_argument(
        "--run-code",
        action="store_true",
        help="run programs that the model writes, on this machine",
    )


def run(args: argparse.Namespace) -> None:
    for option, needed in ONLY_WITH.items():
        if getattr(args, option) not in (None, False) and getattr(args, needed) is None:
            raise ValueError(f"--{option.replace('_', '-')} is for --{needed}; leave it out")
    if args.harness is None:
        _evaluate_texts(args)
    else:
        _evaluate_tasks(args)


def _evaluate_texts(args: argparse.Namespace) -> None:
    from flexolmo_jax.data.sources import Report
    from flexolmo_jax.evaluation.bits_per_byte import bits_per_byte
    from flexolmo_jax.evaluation.split import GROUP_FIELD, chosen_split

    sources = _named_sources(args.data)
    model = load_model(args)
    splits = {
        name: chosen_split(args.model, name, args.heldout, args.group_field, anchor=args.anchor)
        for name in sources
    }
    rows = []
    for name, source in sources.items():
        report, split = Report(), splits[name]
        score = bits_per_byte(
            model, source, without=args.without, only=args.only, text_field=args.text_field,
            heldout=split and split.share, group_field=split.group_field if split else GROUP_FIELD,
            report=report,
        )  # fmt: skip
        report.tell()
        rows.append({"data": name, **score._asdict(), "bad_rows": len(report.bad_rows)})
    if args.json:
        print_json(rows)
        return
    show_table([{**row, "bits_per_byte": f"{row['bits_per_byte']:.4f}"} for row in rows])


def _named_sources(pairs: Sequence[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if not equals or not name or not source:
            raise ValueError(f"--data {pair}: expected NAME=SOURCE")
        if name in sources:
            raise ValueError(
                f"--data {pair}: the name {name!r} is given twice, first to {sources[name]}; give "
                "each text its own name"
            )
        check_text("--data", name)
        sources[name] = source
    return sources


def _evaluate_tasks(args: argparse.Namespace) -> None:
    """Runs tasks, and prints a table of their scores, or with --json everything."""
    from flexolmo_jax.evaluation.harness import evaluate_tasks
    from flexolmo_jax.evaluation.suite import ALL, COLUMNS, chosen, column_scores

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
    report = evaluate_tasks(
        load_model(args), names,
        without=args.without, only=args.only, data=args.task_data and Path(args.task_data),
        limit=args.limit, shots=shots, download=args.download, run_code=args.run_code,
    )  # fmt: skip
    columns = column_scores(paper, report["results"])
    if args.json:
        asked = {"model": args.model, "without": args.without, "only": args.only}
        missing = {task.name: task.needs for task in left_out}
        outcome = {**report, "columns": columns, "not_run": missing}
        print_json({**asked, "limit": args.limit, **outcome})
        return
    _show_tasks(report)
    if paper:
        _show_columns(columns, paper)
    for task in left_out:
        tell(f"{task.name} was not run; it needs {task.needs}")


def _show_tasks(report: Mapping[str, Any]) -> None:
    groups = report["group_subtasks"]
    inner = {task for tasks in groups.values() for task in tasks}
    rows = []
    for name, entry in report["results"].items():
        for metric, value in entry.items():
            short, _, kind = metric.partition(",")
            if name in inner or not kind or short.endswith("_stderr"):
                continue
            error = entry.get(f"{short}_stderr,{kind}")
            shots = {report["n-shot"][task] for task in _tasks_of(name, groups)}
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
    """The tasks of a group and of the groups in it; of a task, itself."""
    if name not in groups:
        return [name]
    return [task for child in groups[name] for task in _tasks_of(child, groups)]


def _show_columns(columns: Mapping[str, float | None], paper: Sequence["PaperTask"]) -> None:
    rows = []
    for column, score in columns.items():
        tasks = ", ".join(task.name for task in paper if task.column == column)
        rows.append(
            {"column": column, "score": "" if score is None else f"{score:.1f}", "tasks": tasks}
        )
    show_table(rows, title="as the columns of the paper's table 2")
