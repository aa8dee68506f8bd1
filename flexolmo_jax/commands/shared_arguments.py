"""Options that several commands share, and what the process does for them."""

import argparse
import contextlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_jax.commands.parser import Parser
from flexolmo_jax.runtime.console import log

if TYPE_CHECKING:
    from flexolmo_jax.federation.source import Require
    from flexolmo_jax.web.keys import Holder, KeyFiles

SOURCE = (
    "JSON Lines, JSON, Parquet, CSV, TSV or text file (all but Parquet also .gz, .zst, .xz, .bz2), "
    "a folder of them, corpus:NAME, or tfds:NAME[/CONFIG]"
)


def need_packages(what: str, extra: str, *packages: str) -> None:
    """Raises ValueError if one of an extra's packages, which `what` needs, is not installed."""
    if any(importlib.util.find_spec(package) is None for package in packages):
        raise ValueError(f"{what} needs more packages: pip install 'flexolmo_jax[{extra}]'")


def optional_path(file: str | None) -> Path | None:
    """The path of an option that may be left out."""
    return None if file is None else Path(file)


def make_key(keys: "KeyFiles[Holder]", file: str, name: str, holder: "Holder") -> None:
    """Adds a key to a file, and prints it, once."""
    print(keys.add(Path(file), holder))
    log(f"this is the key of {name}; {file} keeps its digest only")


def remove_key(keys: "KeyFiles[Holder]", file: str, name: str) -> None:
    """Removes a key from a file."""
    keys.remove(Path(file), name)
    log(f"{file}: removed the key of {name}")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_seed(parser: Parser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def add_anchor(parser: Parser) -> None:
    parser.add_argument("--anchor", metavar="DIR", help="for an expert package: its anchor")


def add_separator(parser: Parser) -> None:
    parser.add_argument(
        "--separator",
        metavar="TOKEN",
        help="the token that begins every document and ends generated text, if a Hugging Face "
        "folder does not name it",
    )


def add_allow_share(parser: Parser) -> None:
    parser.add_argument(
        "--allow-share",
        type=float,
        nargs="?",
        const=1.0,
        default=0.8,
        metavar="SHARE",
        help="the largest share of the anchor's public text that the router may send to an expert "
        "in a layer (default: %(default)s; without a number: any share)",
    )


def add_require_signed(parser: Parser) -> None:
    parser.add_argument(
        "--require-signed",
        metavar="REGISTRY",
        help="refuse every package without a signature that this registry of keys accepts, and "
        "what its log revoked",
    )


def requirement(registry: str | None) -> "Require | None":
    """What `--require-signed` asks of packages; None if it is not given.

    Raises:
      ValueError: the registry is missing, damaged or expired.
    """
    if registry is None:
        return None
    from flexolmo_jax.trust.trusted import Trusted

    return Trusted.open(registry).check


def add_model(parser: Parser) -> None:
    """The options of commands that load a model and may switch off experts."""
    add_profile(parser)
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="a package, a merged model, or a Hugging Face folder",
    )
    add_anchor(parser)
    add_separator(parser)
    parser.add_argument(
        "--without",
        metavar="NAME",
        action="extend",
        nargs="+",
        default=[],
        help="experts to switch off",
    )
    parser.add_argument(
        "--only", metavar="NAME", action="extend", nargs="+", help="the only experts to use"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "int8"), help="the dtype of the weights"
    )
    add_json(parser)


def add_heldout(parser: argparse._ActionsContainer, effect: str) -> None:
    """The options for documents that training held out; `effect` says what is done with them."""
    parser.add_argument("--text-field", default="text", help="default: %(default)s")
    parser.add_argument(
        "--heldout", type=float, metavar="SHARE", nargs="?", const=True, help=effect
    )
    parser.add_argument(
        "--group-field",
        metavar="FIELD",
        help="documents that share it were held out together (default: as the manifest says)",
    )


def add_profile(parser: Parser) -> None:
    parser.add_argument(
        "--profile", metavar="DIR", help="write a trace for TensorBoard or Perfetto; use few steps"
    )


def profile(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Writes a trace of the command, if the command has `--profile` and it is given."""
    folder = getattr(args, "profile", None)
    if folder is None:
        return contextlib.nullcontext()
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would fill the trace
    return jax.profiler.trace(folder, profiler_options=options)


def add_processes(parser: Parser) -> None:
    group = parser.add_argument_group("several processes (run the same command in each)")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the other processes through Cloud TPU, Slurm, Open MPI or Kubernetes",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="or: the address that process 0 listens at"
    )
    group.add_argument("--processes", type=int, metavar="N", help="the number of processes")
    group.add_argument("--process", type=int, metavar="I", help="the index of this process, from 0")
    group.add_argument(
        "--wait",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the others (default: %(default)s)",
    )


def join_processes(args: argparse.Namespace) -> None:
    """Joins the other processes, if the command has such options and they are given."""
    if not hasattr(args, "distributed"):
        return
    explicit = (args.coordinator, args.processes, args.process)
    if not args.distributed and explicit == (None, None, None):
        return
    from flexolmo_jax.runtime import processes
    from flexolmo_jax.runtime.console import silence_progress

    processes.start(*explicit, wait=args.wait)
    if not processes.is_main_process():
        silence_progress()
