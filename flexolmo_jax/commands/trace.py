"""`flexolmo trace`: which text, and whose: indexes of documents, and what stands in them."""

import argparse
import json
from pathlib import Path

from flexolmo_jax.commands import trace_find, trace_serve
from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import SOURCE, add_json, need_packages
from flexolmo_jax.runtime.console import print_json, tell


def add_to(commands: Commands) -> None:
    actions = commands.group(
        "trace",
        "index owners' documents, and find where they hold the words of a text",
        dest="trace",
    )
    parser = actions.add(
        "index", index, "index an owner's documents",
        "Indexes an owner's documents, so that `flexolmo trace find` finds where they hold the "
        "words of a text. The index holds the documents themselves: it must stay with their owner. "
        "What was interrupted continues where it was, if it is called again.",
    )  # fmt: skip
    parser.add_argument(
        "--data", required=True, action="extend", nargs="+", metavar="SOURCE", dest="sources",
        help=SOURCE,
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", required=True, metavar="FILE",
        help="a tokenizer.json, or an anchor, a merged model or a Hugging Face folder that has one",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new index; with --update, the one to change"
    )
    parser.add_argument(
        "--owner", metavar="NAME", help="whose documents they are (default: the name of --out)"
    )
    parser.add_argument(
        "--update", action="store_true", help="add the documents that the index does not have yet"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=2**26, metavar="N",
        help="tokens that are sorted at a time; 20 bytes of memory for each (default: %(default)s)",
    )  # fmt: skip
    add_json(parser)
    parser = actions.add(
        "withdraw", withdraw, "take documents down from an index",
        "Takes documents down: their text leaves the files of the index, and whoever opens it from "
        "then on does not find them.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="DIR", help="an index")
    parser.add_argument(
        "--document", action="extend", nargs="+", default=[], metavar="ID", dest="documents",
        help="all documents of this id, as `flexolmo trace find` shows it",
    )  # fmt: skip
    parser.add_argument(
        "--group", action="extend", nargs="+", default=[], metavar="ID", dest="groups",
        help="all documents of this group",
    )  # fmt: skip
    add_json(parser)
    trace_find.add_to(actions)
    trace_serve.add_to(actions)


def index(args: argparse.Namespace) -> None:
    need_packages("flexolmo trace index", "trace", "pydivsufsort")
    from flexolmo_jax.data.files import counted
    from flexolmo_jax.tracing.build import build_index

    if not args.update:
        _check_owner(Path(args.out).resolve().name if args.owner is None else args.owner)
    built = build_index(
        args.sources,
        _tokenizer_of(Path(args.tokenizer)),
        Path(args.out),
        owner=args.owner,
        update=args.update,
        shard_tokens=args.shard_tokens,
    )
    if args.json:
        print_json(built._asdict())
        return
    tell(
        f"{args.out}: indexed {counted(built.documents, 'document')} of {built.tokens:,} tokens"
        if built.documents
        else f"{args.out}: every document is in the index already, or was withdrawn from it"
    )


def _check_owner(name: str) -> None:
    """An owner has its expert's name, so that switching off the one leaves out the other."""
    from flexolmo_jax.federation.names import PUBLIC, check_name

    try:
        check_name(name if name != PUBLIC else "anchor")
    except ValueError as error:
        raise ValueError(f"--owner: {error}") from error


def _tokenizer_of(path: Path) -> Path:
    """The tokenizer.json of a merged model is that of its anchor; others are where they are."""
    if not path.is_dir() or (path / "tokenizer.json").is_file():
        return path
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        anchor = path / manifest["anchor"]["path"]
    except (OSError, ValueError, KeyError, TypeError):
        anchor = path
    if not (anchor / "tokenizer.json").is_file():
        raise ValueError(
            f"{path}: expected a tokenizer.json there, or a merged model whose anchor has one"
        )
    return anchor


def withdraw(args: argparse.Namespace) -> None:
    from flexolmo_jax.data.files import counted
    from flexolmo_jax.tracing.withdraw import withdraw as take_down

    taken = take_down(Path(args.folder), args.documents, args.groups)
    if args.json:
        print_json(taken._asdict())
        return
    tell(
        f"{args.folder}: withdrew {counted(taken.documents, 'document')} of {taken.tokens:,} "
        "tokens; a process that has the index open has them until it opens it again"
    )
