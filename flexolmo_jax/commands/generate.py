"""`flexolmo generate`: continues prompts."""

import argparse

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_model, add_seed
from flexolmo_jax.runtime.console import print_json


def add_to(commands: Commands) -> None:
    parser = commands.add("generate", run, "continue prompts")
    add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", action="extend", nargs="+")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 decodes greedily (default)"
    )
    parser.add_argument("--top-k", type=int, help="sample from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample from the nucleus of probability P")
    add_seed(parser)


def run(args: argparse.Namespace) -> None:
    from flexolmo_jax.model import load

    model = load(args.model, anchor=args.anchor, dtype=args.dtype, separator=args.separator)
    names = ("without", "only", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(args, name) for name in names}
    if len(args.prompt) == 1 and not args.json:
        pieces = model.stream(args.prompt[0], args.max_new_tokens, **options)
        first = next(pieces, "")  # a wrong option fails before any output
        print(args.prompt[0], first, sep="", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    texts = model.generate(args.prompt, args.max_new_tokens, **options)
    if args.json:
        rows = [{"prompt": p, "continuation": t} for p, t in zip(args.prompt, texts, strict=True)]
        print_json(rows)
        return
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}")
