"""`flexolmo import` and `flexolmo export`: models of Hugging Face, to and from packages."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_anchor, add_separator
from flexolmo_jax.runtime.console import tell

if TYPE_CHECKING:
    from flexolmo_jax.federation.export import PlainRouting


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "import", read, "take a FlexOlmo or FlexMoRE directory apart: an anchor, and packages"
    )
    parser.add_argument("folder", help="a Hugging Face directory with a tokenizer.json")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument(
        "--anchor", metavar="DIR",
        help="write packages for this anchor, if all that the experts share with it is the same, "
        "bit for bit (default: write an anchor too)",
    )  # fmt: skip
    parser.add_argument(
        "--names", metavar="NAME", action="extend", nargs="+", default=[],
        help="of all experts but the public one, in the directory's order (default: expert_1, ...)",
    )  # fmt: skip
    add_separator(parser)
    parser = commands.add(
        "export", write, "write a model as a Hugging Face directory",
        "Writes a model as a Hugging Face directory: an anchor as Olmo2ForCausalLM, a merged model "
        "as FlexOlmoForCausalLM, or FlexMoREForCausalLM if experts are low-rank. What these "
        "classes have no place for (heads, evidence routing, router biases, a router memory) is "
        "computed by a PyTorch file that is written beside the weights.",
    )  # fmt: skip
    parser.add_argument("model", help="a merged model, an anchor, or an expert package")
    parser.add_argument("--out", required=True, metavar="DIR")
    add_anchor(parser)
    parser.add_argument(
        "--without", metavar="NAME", action="extend", nargs="+", default=[],
        help="experts to leave out",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as stored)"
    )
    parser.add_argument(
        "--fold-biases", action="store_true",
        help="fold the router's biases into its rows, and print what that costs on the anchor's "
        "public text",
    )  # fmt: skip
    parser.add_argument(
        "--no-memory", action="store_true",
        help="leave out the router's memory, and print what that costs on the anchor's public text",
    )  # fmt: skip


def read(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.exchange import ANCHOR, EXPERTS, import_mixture

    names = import_mixture(
        Path(args.folder), Path(args.out), args.separator,
        anchor=args.anchor and Path(args.anchor), names=args.names,
    )  # fmt: skip
    anchor = "" if args.anchor else f"{args.out}/{ANCHOR} and "
    tell(f"wrote {anchor}{args.out}/{EXPERTS}: {', '.join(names)}")


def write(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.export import export_model
    from flexolmo_jax.interop.hf_export import CLASSES, MODELING

    routing = _plain_routing(args) if args.fold_biases or args.no_memory else None
    written = export_model(
        Path(args.model), Path(args.out), anchor=args.anchor and Path(args.anchor),
        without=args.without, dtype=args.dtype, routing=routing,
    )  # fmt: skip
    what = f"wrote {args.out}: {CLASSES[written.kind]} of {', '.join(written.names)}"
    if written.needs_our_file:
        tell(
            f"{what}, computed by its file {MODELING}.py (trust_remote_code=True), because no "
            f"class of transformers has a place for {'; '.join(written.extras)}"
        )
    elif any(written.ranks):
        low_rank = sum(rank > 0 for rank in written.ranks)
        tell(f"{what}, {low_rank} of them low-rank; transformers has this class in a fork only")
    else:
        tell(f"{what}, a class of transformers that computes exactly this model")


def _plain_routing(args: argparse.Namespace) -> "PlainRouting":
    """The router without biases or memory, and what it costs, which is printed."""
    import numpy as np

    from flexolmo_jax.evaluation import folding
    from flexolmo_jax.federation.anchor import read_anchor
    from flexolmo_jax.federation.export import PlainRouting, what_is_extra
    from flexolmo_jax.federation.loading import anchor_path
    from flexolmo_jax.federation.package import Package
    from flexolmo_jax.model import load

    path, of_expert = Path(args.model), args.anchor and Path(args.anchor)
    _check_options(args, what_is_extra(path, of_expert, args.without))
    model = load(path, anchor=of_expert)
    anchor = read_anchor(of_expert or anchor_path(Package.open(path)))
    changed = folding.fold_biases(model, anchor) if args.fold_biases else model
    changed = folding.without_memory(changed) if args.no_memory else changed
    cost = folding.cost(model, changed, anchor, args.without)
    words = ["with its biases folded into its rows"] * args.fold_biases
    words += ["without its memory"] * args.no_memory
    note = f"The router is written {' and '.join(words)}. On the anchor's public text: {cost}."
    tell(note)
    rows = np.asarray(changed.experts.router.row[...])
    return PlainRouting(rows, keeps_memory=not args.no_memory, note=note)


def _check_options(args: argparse.Namespace, extras: list[str]) -> None:
    """Raises ValueError unless the options make a plain model of it, and each of them is needed."""
    from flexolmo_jax.federation.export import BIASES, MEMORY

    options = {BIASES: "--fold-biases", MEMORY: "--no-memory"}
    given = {BIASES: args.fold_biases, MEMORY: args.no_memory}
    if others := [extra for extra in extras if extra not in options]:
        raise ValueError(
            f"{args.model}: no option makes a plain model of one with {'; '.join(others)}: leave "
            "out --fold-biases and --no-memory"
        )
    for extra, option in options.items():
        if extra in extras and not given[extra]:
            raise ValueError(f"{args.model}: it also has {extra}: add {option}, or leave out both")
        if given[extra] and extra not in extras:
            raise ValueError(f"{args.model}: it does not have {extra}: leave out {option}")
