"""Commands that take a config: its file or name, and options that change its values."""

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

from flexolmo_jax.commands.parser import Parser, did_you_mean
from flexolmo_jax.config import CONFIGS, load_config

NOTE = (
    "Any value of the config can be set by its name: --steps 500 "
    "--optimizer.learning-rate 1e-3 --data.batch-size 8."
)


def add_config(parser: Parser, help: str) -> None:
    """The config, whose values unknown options may set; they end up in `args.overrides`."""
    parser.add_argument("config", help=help)
    parser.set_defaults(takes_config=True)
    parser.description = f"{(parser.description or '').rstrip('.')}. {NOTE}"


def read_config(args: argparse.Namespace, kind: type, folder: Path = CONFIGS) -> Any:
    """The values of the config, as the command line changes them.

    Args:
      args: `config`, `overrides` and `parser` are used.
      kind: the class of the config.
      folder: where the configs that come with flexolmo_jax are.

    Raises:
      ValueError: there is no such config, or an option is wrong.
    """
    import tyro

    config = load_config(args.config, kind, folder)
    prog = f"{args.parser.prog} {args.config}"
    printed = io.StringIO()  # tyro prints its errors in a frame, and exits
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(type(config), prog=prog, default=config, args=args.overrides)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    unframed = (line.strip("│╭╮╰╯─ ") for line in printed.getvalue().splitlines())
    message = " ".join(" ".join(unframed).split())
    message = message.split(" For full helptext")[0].removeprefix("Unrecognized options ")
    message = message.replace(" Perhaps you meant: ", "; did you mean ")
    if message.startswith("Unrecognized") and "; did you mean" not in message:
        for word in args.overrides:  # perhaps an option of the command, not of the config
            if word.startswith("--"):
                message += did_you_mean(word.partition("=")[0], args.parser.options())
    raise ValueError(message or "a value of the config is wrong")
