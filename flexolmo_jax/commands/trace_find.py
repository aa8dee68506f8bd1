"""`flexolmo trace find`: where the words of a text stand in owners' documents."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_jax.commands.parser import Commands, check_text
from flexolmo_jax.commands.shared_arguments import (
    add_anchor,
    add_json,
    add_seed,
    add_separator,
    need_packages,
)
from flexolmo_jax.runtime.console import log, print_json

if TYPE_CHECKING:
    from flexolmo_jax.model import FlexOlmo
    from flexolmo_jax.tracing.index import Index
    from flexolmo_jax.tracing.results import Trace


def add_to(actions: Commands) -> None:
    """Adds `find` to the actions of `flexolmo trace`."""
    parser = actions.add(
        "find",
        run,
        "find where the words of a text stand in indexed documents",
        "Finds the spans of a text, or of what a model generates, that stand verbatim in indexed "
        "documents: how often, with whom, and where. It says nothing about causes.",
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to trace")
    parser.add_argument("--file", metavar="FILE", help="or: a file that holds it")
    parser.add_argument("--model", metavar="DIR", help="or: a model, which answers --prompt")
    parser.add_argument("--prompt", default="", metavar="P", help="what the text answers")
    parser.add_argument(
        "--index", action="extend", nargs="+", metavar="DIR",
        help="indexes that `flexolmo trace index` made, of one tokenizer",
    )  # fmt: skip
    parser.add_argument(
        "--owners", metavar="FILE",
        help="or: ask owners, each at its own `flexolmo trace serve`; see docs/tracing_service.md",
    )  # fmt: skip
    parser.add_argument(
        "--without", action="extend", nargs="+", default=[], metavar="NAME",
        help="owners to leave out: their experts are switched off, and their documents neither "
        "searched nor named",
    )  # fmt: skip
    parser.add_argument(
        "--similar", type=int, nargs="?", const=5, default=0, metavar="N",
        help="add N passages that are similar, not verbatim (default without a number: 5); this "
        "reads all documents, and needs the extra `embeddings`",
    )  # fmt: skip
    parser.add_argument("--page", metavar="FILE", help="write the trace as one HTML page")
    add_json(parser)
    add_anchor(parser)
    add_separator(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N",
        help="of the model's answer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the model; 0 decodes greedily (default)"
    )
    add_seed(parser)


def run(args: argparse.Namespace) -> None:
    from flexolmo_jax.storage.files import replace_file
    from flexolmo_jax.tracing.index import Index
    from flexolmo_jax.tracing.page import trace_page
    from flexolmo_jax.tracing.table import show_trace
    from flexolmo_jax.tracing.trace import check_indexes

    _check(args)
    if args.owners is not None:
        found = _ask_owners(args)
    else:
        indexes = [Index.open(Path(folder)) for folder in args.index]
        check_indexes(indexes)
        found = _trace_answer(args, indexes) if args.model else _trace_text(args, indexes)
    if args.page:
        replace_file(Path(args.page), trace_page(found, args.prompt))
        log(f"wrote {args.page}")
    if args.json:
        print_json(found.to_json())
    else:
        show_trace(found, args.prompt)


def _check(args: argparse.Namespace) -> None:
    given = [name for name in ("text", "file", "model") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(
            "expected one of TEXT, --file FILE, and --model DIR with --prompt, found "
            f"{' and '.join('TEXT' if name == 'text' else f'--{name}' for name in given) or 'none'}"
        )
    if args.text is not None:
        check_text("TEXT", args.text)
    if args.model is not None and not args.prompt:
        raise ValueError("--model: expected --prompt P, which the model answers, found none")
    if (args.index is None) == (args.owners is None):
        raise ValueError("expected either --index DIR or --owners FILE")
    if args.owners is not None and args.similar:
        raise ValueError("--similar: owners are asked for verbatim spans only; leave it out")
    if args.similar < 0:
        raise ValueError(f"--similar: expected 0 or more passages, found {args.similar}")


def _ask_owners(args: argparse.Namespace) -> "Trace":
    import asyncio

    need_packages("--owners", "serve", "httpx", "pydantic")
    from flexolmo_jax.tracing.service.ask import ask
    from flexolmo_jax.tracing.service.owners import read_owners

    owners = read_owners(Path(args.owners))
    for name in args.without if args.model is None else ():
        if name not in owners.addresses:
            known = ", ".join(owners.addresses)
            raise ValueError(
                f"--without: expected owners of {args.owners} ({known}), found {name!r}"
            )
    text = _answer(args)[1] if args.model else _text(args)
    asked = owners.of(set(owners.addresses) - set(args.without))
    if not asked:
        raise ValueError("--without: all owners are left out; nobody is left to ask")
    return asyncio.run(ask(text, asked, prompt=args.prompt, seconds=owners.seconds))


def _trace_text(args: argparse.Namespace, indexes: list["Index"]) -> "Trace":
    from flexolmo_jax.tracing.trace import of_owners, trace

    owners = sorted({index.owner for index in indexes})
    for name in args.without:
        if name not in owners:
            raise ValueError(
                f"--without: expected owners of the indexes ({', '.join(owners)}), found {name!r}"
            )
    kept = of_owners(indexes, [name for name in owners if name not in args.without], owners)
    return trace(_text(args), kept, prompt=args.prompt, similar=args.similar)


def _answer(args: argparse.Namespace) -> tuple["FlexOlmo", str]:
    """The model, and what it says without the experts of owners that are left out."""
    from flexolmo_jax.model import load

    model = load(args.model, anchor=args.anchor, separator=args.separator)
    options = {name: getattr(args, name) for name in ("without", "temperature", "seed")}
    return model, str(model.generate([args.prompt], args.max_new_tokens, **options)[0])


def _text(args: argparse.Namespace) -> str:
    text = args.text if args.file is None else _read(Path(args.file))
    if not any(character.isalnum() for character in text):
        raise ValueError(f"the text to trace has no word: {text[:40]!r}")
    return text


def _trace_answer(args: argparse.Namespace, indexes: list["Index"]) -> "Trace":
    model, answer = _answer(args)
    more = {"prompt": args.prompt, "without": args.without, "similar": args.similar}
    return model.trace(answer, indexes, **more)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--file: expected a file of text in UTF-8 ({error})") from error
