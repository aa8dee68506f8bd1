"""`flexolmo compress`: makes an expert package smaller: low-rank deltas, integers, or both."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import SOURCE, add_anchor
from flexolmo_jax.runtime.console import show_table, tell

if TYPE_CHECKING:  # importing it imports JAX, which no --help waits for
    from flexolmo_jax.federation.compress import Compressed
    from flexolmo_jax.training.prune import Pruned


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "compress", run, "make an expert package smaller: low-rank deltas, integers, or both"
    )
    parser.add_argument("package", help="an expert package")
    parser.add_argument("--out", required=True, metavar="DIR")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--rank", type=int, metavar="R", help="the rank of every delta to the public expert"
    )
    size.add_argument(
        "--energy", type=float, metavar="SHARE",
        help="the share of every delta's squared norm to keep, such as 0.99; each matrix of each "
        "layer gets the smallest rank that does",
    )  # fmt: skip
    size.add_argument(
        "--width", type=int, metavar="UNITS",
        help="hidden units to keep in each layer: those that matter most on the owner's text, "
        "which --data names, refitted to what all of them did",
    )  # fmt: skip
    parser.add_argument(
        "--bits", type=int, choices=(8, 4),
        help="store all matrices as integers of 8 bits, with a scale for each output channel, or "
        "of 4 bits, with one for each group of rows of it",
    )  # fmt: skip
    parser.add_argument(
        "--group", type=int, metavar="ROWS", help="with --bits 4: rows of a group (default: 64)"
    )
    parser.add_argument(
        "--data", metavar="SOURCE",
        help="the owner's text: what compressing costs in bits per byte is measured on it (on its "
        "held-out documents, if training held out some) and on the anchor's public text; a "
        f"{SOURCE}",
    )  # fmt: skip
    add_anchor(parser)


def run(args: argparse.Namespace) -> None:
    done = _compress(args) if args.width is None else _prune(args)
    before, after = done.bytes_before, done.bytes_after
    tell(
        f"wrote {args.out}: {after / 1e6:,.2f} MB of weights, {after / before:.1%} of the "
        f"{before / 1e6:,.2f} MB of {args.package}"
    )
    if after >= before:
        tell("no smaller than it was: choose a lower --rank or --energy, or fewer --bits")
    if args.data is None:
        tell("with --data SOURCE, what that costs in bits per byte would be shown here")
    else:
        _show_cost(args)


def _compress(args: argparse.Namespace) -> "Compressed":
    from flexolmo_jax.federation.compress import compress

    done = compress(
        Path(args.package), Path(args.out), rank=args.rank, energy=args.energy, bits=args.bits,
        group=args.group, anchor=args.anchor and Path(args.anchor),
    )  # fmt: skip
    _show_matrices(done)
    return done


def _prune(args: argparse.Namespace) -> "Pruned":
    from flexolmo_jax.training.prune import prune

    if args.data is None:
        raise ValueError("--width needs --data, the owner's text: it says which units matter")
    if args.bits is not None:
        raise ValueError("--width and --bits one after the other: compress what --width writes")
    done = prune(
        Path(args.package), Path(args.out), args.width, args.data,
        args.anchor and Path(args.anchor),
    )  # fmt: skip
    layers = [
        {"layer": number, "output kept": f"{share:.2%}"} for number, share in enumerate(done.kept)
    ]
    show_table(layers, title=f"squared norm of each layer's output on {done.tokens:,} tokens")
    return done


def _show_matrices(done: "Compressed") -> None:
    rows = [
        {
            "matrix": name,
            "rank by layer": " ".join(map(str, ranks)),
            "energy kept": " ".join(f"{share:.1%}" for share in done.energy[name]),
        }
        for name, ranks in done.ranks.items()
    ]
    if rows:
        show_table(rows, title="deltas to the public expert")
    rounded = [
        {"matrix": name, "error of rounding": f"{error:.2%}"}
        for name, error in done.rounding.items()
    ]
    if rounded:
        show_table(rounded, title="integers: the norm of the error, by that of the matrix")


def _show_cost(args: argparse.Namespace) -> None:
    """Bits per byte of the expert beside its anchor, as its owner uses it: before and after."""
    from flexolmo_jax.data.sources import Document
    from flexolmo_jax.evaluation.bits_per_byte import bits_per_byte, score
    from flexolmo_jax.federation.anchor import open_anchor
    from flexolmo_jax.federation.loading import anchor_path
    from flexolmo_jax.federation.package import Package
    from flexolmo_jax.federation.source import open_source
    from flexolmo_jax.model import load

    package = Package.open(Path(args.package), "expert")
    anchor = Path(args.anchor) if args.anchor else anchor_path(package)
    opened = open_anchor(open_source(anchor, "anchor"), package.manifest.get("separator"))
    public = [Document(text, str(n)) for n, text in enumerate(opened.public_text)]
    split = package.manifest.get("heldout") or {"share": 0, "group_field": "group"}
    rows: dict[str, dict[str, str]] = {"the owner's text": {}, "public text": {}}
    for column, path in {"anchor": anchor, "before": args.package, "after": args.out}.items():
        model = load(path, anchor=None if path == anchor else anchor)
        own = bits_per_byte(
            model, args.data, heldout=split["share"] or None, group_field=split["group_field"]
        )
        rows["the owner's text"][column] = f"{own.bits_per_byte:.4f}"
        if public:
            rows["public text"][column] = f"{score(model, public).bits_per_byte:.4f}"
    shown = [{"bits per byte": name, **scores} for name, scores in rows.items() if scores]
    show_table(shown, title="of the anchor alone, and with the expert beside it")
