"""`flexolmo trace serve`: an owner answers traces, as far as its policy lets it."""

import argparse
from pathlib import Path

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import (
    add_json,
    make_key,
    need_packages,
    optional_path,
    remove_key,
)
from flexolmo_jax.runtime.console import print_json, show_table, tell


def add_to(commands: Commands) -> None:
    """Adds the actions `serve`, `policy`, `keys` and `log` to `flexolmo trace`."""
    parser = commands.add(
        "serve",
        run,
        "answer traces over HTTP, as far as a policy lets it",
        "Answers which words of a text stand in an index. The policy says how much: nothing, "
        "counts, ids of documents, or snippets. It is meant for the owner's own machine; "
        "coordinators ask it (`flexolmo trace find --owners`, `flexolmo serve --trace-owners`).",
    )
    parser.add_argument("--index", required=True, metavar="DIR", help="of `flexolmo trace index`")
    parser.add_argument(
        "--policy", required=True, metavar="FILE", help="TOML; `flexolmo trace policy` prints one"
    )
    parser.add_argument(
        "--keys", metavar="FILE",
        help="answer only those whose key `flexolmo trace keys add` made (default: anybody)",
    )  # fmt: skip
    parser.add_argument(
        "--log", metavar="FILE",
        help="append to it what was revealed to whom; daily budgets are counted from it",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8100, metavar="N", help="default: %(default)s")
    parser.add_argument("--certificate", metavar="FILE", help="PEM, for TLS")
    parser.add_argument(
        "--private-key", metavar="FILE", help="PEM (default: that in --certificate)"
    )
    commands.add("policy", print_policy, "print a policy to begin with")
    keys = commands.group("keys", "keys of those who may ask `flexolmo trace serve`", "what")
    parser = keys.add("add", add, "make a key, and print it once")
    parser.add_argument("file", metavar="FILE", help="of keys; made if it is missing")
    parser.add_argument("name", metavar="NAME", help="whose key it is")
    parser = keys.add("remove", remove, "remove a key")
    parser.add_argument("file", metavar="FILE", help="of keys")
    parser.add_argument("name", metavar="NAME", help="whose key it is")
    parser = keys.add("list", list_keys, "list whose keys there are")
    parser.add_argument("file", metavar="FILE", help="of keys")
    add_json(parser)
    parser = commands.add(
        "log", show_log, "verify a log of `flexolmo trace serve`, and sum it up",
        "Verifies that no line of a log was changed, dropped or moved, and shows what was "
        "revealed to whom, day by day. Whether its last lines are missing, only --receipt shows.",
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", help="of `flexolmo trace serve --log`")
    parser.add_argument(
        "--receipt", metavar="DIGEST", action="extend", nargs="+", default=[],
        help="that an answer had (`receipts` of `flexolmo trace find --owners FILE --json`): check "
        "that its line is there",
    )  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    need_packages("flexolmo trace serve", "serve", "fastapi", "uvicorn")
    if args.private_key is not None and args.certificate is None:
        raise ValueError("--private-key: expected --certificate with it")
    if args.log is not None and not Path(args.log).absolute().parent.is_dir():
        raise ValueError(f"--log: no such folder {Path(args.log).parent}; make it first")
    from flexolmo_jax.tracing.service.app import serve
    from flexolmo_jax.tracing.service.owner import Settings

    files = optional_path(args.keys), optional_path(args.log)
    for_tls = optional_path(args.certificate), optional_path(args.private_key)
    serve(Settings(Path(args.index), Path(args.policy), *files), args.host, args.port, *for_tls)


def print_policy(args: argparse.Namespace) -> None:
    from flexolmo_jax.tracing.service.policy import EXAMPLE

    print(EXAMPLE, end="")


def add(args: argparse.Namespace) -> None:
    from flexolmo_jax.tracing.service.askers import KEYS, Asker

    make_key(KEYS, args.file, args.name, Asker(args.name))


def remove(args: argparse.Namespace) -> None:
    from flexolmo_jax.tracing.service.askers import KEYS

    remove_key(KEYS, args.file, args.name)


def list_keys(args: argparse.Namespace) -> None:
    from flexolmo_jax.tracing.service.askers import KEYS

    rows = [{"name": asker.name} for asker in KEYS.read(Path(args.file))]
    if args.json:
        print_json(rows)
        return
    show_table(rows, title=f"keys of {args.file}", empty="no keys")


def show_log(args: argparse.Namespace) -> None:
    from flexolmo_jax.storage import hash_chain
    from flexolmo_jax.tracing.service.revealed import usage

    last, missing = hash_chain.START, set(args.receipt)

    def records():
        nonlocal last
        for record in hash_chain.read(Path(args.file)):
            last = record["digest"]
            missing.discard(last)
            yield record

    rows = [
        {"day": day, "asker": asker, **used._asdict()}
        for (day, asker), used in sorted(usage(records()).items())
    ]
    if missing:
        raise ValueError(
            f"{args.file}: no line has the digest {min(missing)}: the answer with this receipt was "
            "removed or changed, or is another log's"
        )
    if args.json:
        print_json({"last": last, "days": rows})
        return
    show_table(rows, title=f"revealed, by {args.file}", empty="no answers")
    tell(f"These lines are as they were written, and the last one's digest is {last}.")
    if not args.receipt:
        tell("Whether lines after it were cut off, only a receipt of an answer shows (--receipt).")
