"""`flexolmo generate`: continues prompts."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_model, add_seed, load_model
from flexolmo_jax.runtime.console import print_json, show_table


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
    parser.add_argument(
        "--expert-mass", action="store_true",
        help="say how much of each answer every expert computed: its router weights, mean over the "
        "layers, summed over the answer's tokens",
    )  # fmt: skip
    add_seed(parser)


def run(args: argparse.Namespace) -> None:
    model = load_model(args)
    names = ("without", "only", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(args, name) for name in names}
    masses: list[dict[str, float]] = []
    options["on_mass"] = masses.append if args.expert_mass else None
    if len(args.prompt) == 1 and not args.json:
        pieces = model.stream(args.prompt[0], args.max_new_tokens, **options)
        first = next(pieces, "")  # a wrong option fails before any output
        print(args.prompt[0], first, sep="", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        _show_masses(masses)
        return
    texts = model.generate(args.prompt, args.max_new_tokens, **options)
    if args.json:
        rows: list[dict[str, Any]] = [
            {"prompt": p, "continuation": t} for p, t in zip(args.prompt, texts, strict=True)
        ]
        for row, mass in zip(rows, masses, strict=False):
            row["expert_mass"] = mass
        print_json(rows)
        return
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}")
    _show_masses(masses)


def _show_masses(masses: Sequence[Mapping[str, float]]) -> None:
    """A table, if there are any: how many tokens of each answer are each expert's."""
    rows = [
        {"answer": number, "expert": name, "tokens": f"{tokens:.2f}", "share": f"{share:.1%}"}
        for number, mass in enumerate(masses, 1)
        for name, tokens in mass.items()
        for share in [tokens / sum(mass.values())]
    ]
    if masses:
        show_table(rows, title="routing mass", empty="no token was generated")
