"""`flexolmo import` and `flexolmo export`: mixtures of Hugging Face, to and from packages."""

import argparse
from pathlib import Path

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_separator
from flexolmo_jax.runtime.console import tell


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "import", read, "take a FlexOlmo or FlexMoRE directory apart: an anchor, and packages"
    )
    parser.add_argument("folder", help="a Hugging Face directory with a tokenizer.json")
    parser.add_argument("--out", required=True, metavar="DIR")
    add_separator(parser)
    parser = commands.add(
        "export", write, "write a merged model as a FlexOlmo or FlexMoRE directory"
    )
    parser.add_argument("model", help="a merged model, routed by rows and without memory")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument(
        "--without-biases", action="store_true",
        help="leave out the router's biases, which the directory has no place for: then experts "
        "are chosen more often than here",
    )  # fmt: skip


def read(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.exchange import ANCHOR, EXPERTS, import_mixture

    names = import_mixture(Path(args.folder), Path(args.out), args.separator)
    tell(f"wrote {args.out}/{ANCHOR} and {args.out}/{EXPERTS}: {', '.join(names)}")


def write(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.exchange import export_mixture

    ranks = export_mixture(Path(args.model), Path(args.out), args.without_biases)
    low_rank = [rank for rank in ranks if rank]
    kind = f"FlexMoRE directory, {len(low_rank)} of" if low_rank else "FlexOlmo directory of"
    tell(f"wrote {args.out}: a {kind} {len(ranks)} experts" + " low-rank" * bool(low_rank))
