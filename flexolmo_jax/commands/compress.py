"""`flexolmo compress`: makes an expert package smaller: low-rank deltas to the public expert."""

import argparse
from pathlib import Path

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_anchor
from flexolmo_jax.runtime.console import show_table, tell


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "compress", run, "make an expert package smaller: low-rank deltas to the public expert"
    )
    parser.add_argument("package", help="an expert package")
    parser.add_argument("--out", required=True, metavar="DIR")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="R", help="the rank of every delta")
    size.add_argument(
        "--energy", type=float, metavar="SHARE",
        help="the share of every delta's squared norm to keep, such as 0.99; each matrix of each "
        "layer gets the smallest rank that does",
    )  # fmt: skip
    add_anchor(parser)


def run(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.compress import compress

    done = compress(
        Path(args.package), Path(args.out), rank=args.rank, energy=args.energy,
        anchor=args.anchor and Path(args.anchor),
    )  # fmt: skip
    rows = [
        {
            "matrix": name,
            "rank by layer": " ".join(map(str, ranks)),
            "energy kept": " ".join(f"{share:.1%}" for share in done.energy[name]),
        }
        for name, ranks in done.ranks.items()
    ]
    before, after = done.bytes_before, done.bytes_after
    show_table(rows, title="deltas to the public expert")
    tell(
        f"wrote {args.out}: {after / 1e6:,.2f} MB of weights, {after / before:.1%} of the "
        f"{before / 1e6:,.2f} MB of {args.package}; score both with `flexolmo evaluate`"
    )
    if after >= before:
        tell("no smaller than it was: choose a lower --rank or --energy")
