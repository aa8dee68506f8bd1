"""`flexolmo demo`: the whole idea in a few minutes."""

import argparse
from pathlib import Path

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_seed


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "demo", run, "train, merge and switch off experts on bundled text, in a few minutes"
    )
    parser.add_argument(
        "--out", default="flexolmo_demo", metavar="DIR", help="default: %(default)s"
    )
    add_seed(parser)


def run(args: argparse.Namespace) -> None:
    from flexolmo_jax.studies.demo import run_demo

    run_demo(Path(args.out), args.seed)
