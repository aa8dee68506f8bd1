"""An argument parser whose errors are one line, and say what was probably meant."""

import argparse
import difflib
import importlib.metadata
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flexolmo_jax.version import __version__

# Arguments that are text, and no paths.
TEXTS = ("prompt", "name", "names", "expert", "without", "only", "text_field", "separator")


class UsageError(ValueError):
    """A command line that cannot be understood; the text is for the user."""


class Parser(argparse.ArgumentParser):
    """As `argparse.ArgumentParser`, but a wrong command line raises `UsageError`."""

    def error(self, message: str) -> NoReturn:
        raise WrongUse(self, message)

    def options(self) -> list[str]:
        """The options of this command, as `--out`."""
        return [one for one in self._option_string_actions if one.startswith("--")]


class WrongUse(Exception):
    """What argparse says, and which command's parser says it."""

    def __init__(self, parser: Parser, message: str):
        super().__init__(message)
        self.parser = parser


class Version(argparse.Action):
    """`--version`: what a report of a fault has to say; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        jax = importlib.metadata.version("jax")
        print(f"flexolmo_jax {__version__}, JAX {jax}, Python {platform.python_version()}")
        parser.exit()


def parse(parser: Parser, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """As `parse_known_args`.

    Raises:
      UsageError: what is wrong, what was probably meant, and where help is.
    """
    try:
        return parser.parse_known_args(words)
    except WrongUse as wrong:
        message = _with_suggestion(str(wrong), wrong.parser, words)
        raise UsageError(f"{message}; see {wrong.parser.prog} --help") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: " (did you mean --out?)", or nothing if no known word is close."""
    by_letters = {one.replace("_", "-"): one for one in known}
    close = difflib.get_close_matches(word.replace("_", "-"), by_letters, n=1)
    return f" (did you mean {by_letters[close[0]]}?)" if close else ""


def _with_suggestion(message: str, parser: Parser, words: Sequence[str]) -> str:
    choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message, re.DOTALL)
    if choice:
        meant = did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2]))
        return message.split(" (choose from")[0] + meant if meant else message
    if "required" in message:  # perhaps it was given, with a slip of the finger
        missing = [one for one in parser.options() if one in message]
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in parser.options():
                meant = did_you_mean(name, missing)
                if meant:
                    return f"unknown argument {name}{meant}"
        if not missing and parser.prog == "flexolmo":
            return f"{message}; `flexolmo demo` shows the whole idea"
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
