"""`flexolmo study`: FlexOlmo against every baseline; or a single study by its name."""

import argparse
import functools
import importlib
from pathlib import Path

from flexolmo_jax.commands.config_options import add_config, read_config
from flexolmo_jax.commands.parser import Commands, Parser
from flexolmo_jax.runtime.console import tell
from flexolmo_jax.studies.registry import STUDIES


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "study",
        run,
        "compare FlexOlmo with every baseline on the same texts, over several seeds",
        "Trains and compares all methods, stage by stage, and writes a report",
        trains=True,
    )
    add_config(parser, "a Python file that sets `config`, or ci or full")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the stages and the report"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="the seeds to run now (default: 0)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue in an existing DIR; unchanged stages are reused",
    )
    if STUDIES:
        parser.epilog = (
            "Single studies: `flexolmo study NAME --help`, where NAME is one of "
            f"{', '.join(STUDIES)}."
        )
    parser.delegates = {
        name: functools.partial(_parser_of, name, module) for name, module in STUDIES.items()
    }


def run(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import CONFIGS
    from flexolmo_jax.studies.baselines.config import StudyConfig
    from flexolmo_jax.studies.baselines.run import run_study

    config = read_config(args, StudyConfig, CONFIGS / "study")
    run_study(config, Path(args.out), args.seeds, args.resume)
    tell(f"wrote {args.out}/report.md, report.json and figures")


def _parser_of(name: str, module_name: str) -> Parser:
    """The parser of a single study; only this imports its module."""
    module = importlib.import_module(module_name)
    parser = Parser(
        prog=f"flexolmo study {name}", description=module.__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    module.add_arguments(parser)
    parser.set_defaults(run_command=module.run, parser=parser, trains=False, takes_config=False)
    return parser
