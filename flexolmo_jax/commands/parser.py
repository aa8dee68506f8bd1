"""Commands and their parsers; errors are one line, and say what was probably meant."""

import argparse
import difflib
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flexolmo_jax.version import __version__

Run = Callable[[argparse.Namespace], int | None]  # an exit code; None is 0
# Arguments that are text, not paths.
TEXTS = ("prompt", "name", "names", "expert", "without", "only", "text_field", "separator")


class UsageError(ValueError):
    """A command line that cannot be understood; the text is for the user."""


class Parser(argparse.ArgumentParser):
    """As `argparse.ArgumentParser`, but a wrong command line raises `WrongUse`.

    Attributes:
      delegates: makes the parser that takes over if its name is the first argument.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.delegates: dict[str, Callable[[], Parser]] = {}

    def error(self, message: str) -> NoReturn:
        raise WrongUse(self, message)

    def options(self) -> list[str]:
        """The options of this command, as `--out`."""
        return [option for option in self._option_string_actions if option.startswith("--")]

    def parse_known_args(self, args=None, namespace=None):
        if args and args[0] in self.delegates:
            return self.delegates[args[0]]().parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)


class Commands:
    """The commands of `flexolmo`, or the actions of one command, as `anchor` of `train`."""

    def __init__(self, parser: Parser, dest: str):
        self._parsers: argparse._SubParsersAction[Parser] = parser.add_subparsers(
            dest=dest, required=True, metavar=dest.upper(), parser_class=Parser
        )

    def add(
        self,
        name: str,
        run: Run,
        help: str,
        description: str | None = None,
        *,
        trains: bool = False,
    ) -> Parser:
        """Adds a command.

        Args:
          name: the word that calls it.
          run: does the work, with the parsed arguments.
          help: one line for the list of commands.
          description: for the command's own help; default: `help`.
          trains: it trains in this process, and can be resumed.

        Returns:
          the command's parser, for its arguments.
        """
        # No abbreviations: an unknown option may be a value of the config.
        parser = self._parsers.add_parser(
            name, help=help, description=description or help, allow_abbrev=False
        )
        parser.set_defaults(run_command=run, parser=parser, trains=trains, takes_config=False)
        return parser

    def group(self, name: str, help: str, dest: str = "action") -> "Commands":
        """Adds a command of several actions, as `train`."""
        return Commands(self._parsers.add_parser(name, help=help), dest)


class WrongUse(Exception):
    """A message of argparse, and the command's parser that raised it."""

    def __init__(self, parser: Parser, message: str):
        super().__init__(message)
        self.parser = parser


class Version(argparse.Action):
    """`--version`: the versions that a bug report needs; looked up only on request."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        jax = importlib.metadata.version("jax")
        print(f"flexolmo_jax {__version__}, JAX {jax}, Python {platform.python_version()}")
        parser.exit()


def parse(parser: Parser, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """As `parse_known_args`.

    Raises:
      UsageError: the text says what is wrong, what was probably meant, and how to get help.
    """
    try:
        return parser.parse_known_args(words)
    except WrongUse as wrong:
        message = _with_suggestion(str(wrong), wrong.parser, words)
        raise UsageError(f"{message}; see {wrong.parser.prog} --help") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: " (did you mean --out?)", or nothing if no known word is close."""
    by_letters = {name.replace("_", "-"): name for name in known}
    close = difflib.get_close_matches(word.replace("_", "-"), by_letters, n=1)
    return f" (did you mean {by_letters[close[0]]}?)" if close else ""


def _with_suggestion(message: str, parser: Parser, words: Sequence[str]) -> str:
    choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message, re.DOTALL)
    if choice:
        meant = did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2]))
        return message.split(" (choose from")[0] + meant if meant else message
    if "required" in message:  # perhaps it was given with a typo
        missing = [option for option in parser.options() if option in message]
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in parser.options():
                meant = did_you_mean(name, missing)
                if meant:
                    return f"unknown argument {name}{meant}"
        if not missing and parser.prog == "flexolmo":
            return f"{message}; start with `flexolmo demo`"
    return message


def check_texts(args: argparse.Namespace) -> None:
    """Raises ValueError if a text among the arguments is not UTF-8; paths may be of any bytes."""
    for name in TEXTS:
        given = getattr(args, name, None) or []
        for text in [given] if isinstance(given, str) else given:
            check_text(f"--{name.replace('_', '-')}", text)
    option = "the command"
    for word in args.overrides:  # --name value, or --name=value
        if word.startswith("--"):
            option, _, word = word.partition("=")
        if not Path(word).exists():
            check_text(option, word)


def check_text(option: str, text: str) -> None:
    """Raises ValueError if the text that was given for an option is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{option}: expected text in UTF-8, found {ascii(text)}: it is in another encoding, "
            "such as Latin-1; set the terminal to UTF-8, or convert the text"
        ) from error
