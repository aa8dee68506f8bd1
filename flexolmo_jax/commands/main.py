"""The command `flexolmo`: parses, dispatches, and turns errors into one line and an exit code."""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from flexolmo_jax.commands import (
    admit,
    audit,
    compress,
    data,
    demo,
    evaluate,
    experts,
    generate,
    hugging_face,
    inspect,
    merge,
    plan,
    privacy,
    registry,
    revoke,
    serve,
    sign,
    study,
    trace,
    train,
    usage,
)
from flexolmo_jax.commands.parser import (
    Commands,
    Parser,
    UsageError,
    Version,
    check_texts,
    did_you_mean,
    parse,
)
from flexolmo_jax.commands.shared_arguments import join_processes, profile
from flexolmo_jax.runtime.compilation_cache import is_of_cache, keep_compiled_programs
from flexolmo_jax.runtime.console import tell, visible
from flexolmo_jax.runtime.endings import AlreadyDone, Interrupted
from flexolmo_jax.runtime.startup import (
    end_at_second_interrupt,
    leave_libtpu_alone,
    use_large_pages,
)

COMMANDS = (  # in the order of --help
    demo, train, compress, plan, sign, registry, admit, merge, experts, privacy, audit, inspect,
    evaluate, study, generate, serve, revoke, usage, trace, data, hugging_face,
)  # fmt: skip
EVERYWHERE = ("--debug", "--no-cache")  # options that may stand before or after the command
INTERRUPTED = 130
EXIT_CODES = (
    "Exit codes: 0 success, or SIGTERM stopped a training that saved its state; 2 an error, "
    "printed as one line; of `admit`, 3 needs review and 4 rejected; 130 interrupted by Ctrl-C (a "
    "training has saved its state)."
)


def make_parser() -> Parser:
    """The parser of all commands. The parsed arguments hold `run_command`, which does the work."""
    parser = Parser(
        prog="flexolmo",
        description="Language models of many data owners who never pool their data.",
        epilog="Start with `flexolmo demo`: it shows the whole idea on bundled text, and leaves "
        "an anchor for your own expert: `flexolmo train expert demo_expert --anchor "
        f"flexolmo_demo/anchor --data my_texts.jsonl --name mine --out mine`. {EXIT_CODES}",
    )
    parser.add_argument(
        "--version", action=Version, nargs=0, help="versions of flexolmo_jax, JAX and Python"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="keep no compiled programs in ~/.cache/flexolmo_jax for the next command",
    )
    commands = Commands(parser, "command")
    for module in COMMANDS:
        module.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, by default the one that this program was started with.

    Returns:
      the exit code (`EXIT_CODES`).
    """
    is_program = arguments is None
    words = list(sys.argv[1:] if arguments is None else arguments)
    leave_libtpu_alone()
    try:
        args, rest = parse(make_parser(), [word for word in words if word not in EVERYWHERE])
        if rest and not args.takes_config:
            meant = did_you_mean(rest[0].partition("=")[0], args.parser.options())
            more = f"{meant}; see {args.parser.prog} --help"
            raise UsageError(f"unknown argument {rest[0]}{more}")
    except UsageError as error:
        return _fail(error)
    args.overrides = rest
    if args.trains and is_program:
        use_large_pages()
    if is_program and "--no-cache" not in words:
        keep_compiled_programs()
    warnings.showwarning = _show_warning
    sys.excepthook = _show_uncaught
    try:
        check_texts(args)
        join_processes(args)
        if is_program:
            end_at_second_interrupt()
        with profile(args):
            return args.run_command(args) or 0
    except KeyboardInterrupt:
        resume = "; continue with --resume" if args.trains else ""
        print(f"flexolmo: interrupted; saved work is kept{resume}", file=sys.stderr)
        return INTERRUPTED
    except Interrupted as stop:
        print(f"flexolmo: {visible(stop)}", file=sys.stderr)
        return INTERRUPTED if stop.by_user else 0
    except AlreadyDone as done:
        tell(str(done))
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
            code = 2
        else:
            code = _fail(error)
        _leave_the_others()
        return code
    return 0


def _fail(error: Exception) -> int:
    print(f"flexolmo: error: {visible(_one_line(error))}", file=sys.stderr)
    return 2


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("Not enough disk space"):  # from TFDS, which does not know the sizes
        text = os.strerror(errno.ENOSPC)
    for number, what in ((errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "a quota is used up")):
        if os.strerror(number) in text:
            return (
                f"{what} ({os.strerror(number).lower()}): make room, and run it again; a training "
                "continues with --resume"
            )
    expected = (ValueError, OSError, FloatingPointError)
    if not isinstance(error, expected) and len(text) > 300:
        text = text[:300] + " ..."
    return (
        text if isinstance(error, (*expected, RuntimeError)) else f"{type(error).__name__}: {text}"
    )


def _leave_the_others() -> None:
    """Ends this process at once if it is one of several: a tidy end would wait for the others."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(2)  # JAX then tells the others, and they end too


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    # Ours are for the user; others are for developers.
    if category is UserWarning and not is_of_cache(str(message)):
        print(f"flexolmo: warning: {visible(message)}", file=sys.stderr)


def _show_uncaught(kind, error, trace) -> None:
    """Hides what threads of TensorStore raise after a failed write that was reported already."""
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__excepthook__(kind, error, trace)
