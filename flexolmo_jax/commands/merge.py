"""`flexolmo merge`: joins an anchor and expert packages into a merged model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import (
    add_allow_share,
    add_require_signed,
    add_separator,
    requirement,
)
from flexolmo_jax.config import EVIDENCE, MEMORY
from flexolmo_jax.runtime.console import show_table, tell

if TYPE_CHECKING:
    from flexolmo_jax.federation.routing import EvidenceChoice
    from flexolmo_jax.federation.shares import Shares


def add_to(commands: Commands) -> None:
    parser = commands.add("merge", run, "join an anchor and expert packages, without training")
    parser.add_argument("--anchor", required=True, metavar="DIR")
    parser.add_argument(
        "--expert", required=True, metavar="DIR", action="extend", nargs="+", dest="experts"
    )
    parser.add_argument("--out", required=True, metavar="DIR")
    add_separator(parser)
    parser.add_argument(
        "--active", type=int, metavar="A", help="experts that a token may use (default: all)"
    )
    add_allow_share(parser)
    add_require_signed(parser)
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "--memory",
        type=float,
        nargs=2,
        metavar=("DECAY", "WEIGHT"),
        default=MEMORY,
        help="how much the earlier tokens of a document influence the router "
        "(default: %(default)s)",
    )
    memory.add_argument(
        "--no-memory",
        action="store_const",
        const=None,
        dest="memory",
        help="route each token on its own, as in the paper and in Hugging Face's gate",
    )
    evidence = parser.add_mutually_exclusive_group()
    evidence.add_argument(
        "--evidence",
        type=float,
        nargs=3,
        metavar=("DECAY", "STRENGTH", "SHIFT"),
        default=(),  # argparse would read a text as a number
        help="route by what each expert's evidence head says of the tokens read, instead of by "
        f"router rows (default: {' '.join(map(str, EVIDENCE))} if everybody has such a head)",
    )
    evidence.add_argument(
        "--no-evidence",
        action="store_const",
        const=None,
        dest="evidence",
        help="route by router rows, whatever heads there are",
    )


def run(args: argparse.Namespace) -> None:
    from flexolmo_jax.federation.merge import merge
    from flexolmo_jax.federation.package import read_manifest
    from flexolmo_jax.federation.routing import Routing

    evidence: EvidenceChoice = (
        "auto" if args.evidence == () else args.evidence and tuple(args.evidence)
    )
    shares = merge(
        args.anchor, args.experts, args.out, active_experts=args.active,
        memory=args.memory and tuple(args.memory), evidence=evidence,
        separator=args.separator, allow_share=args.allow_share,
        require=requirement(args.require_signed),
    )  # fmt: skip
    routing = Routing.of(read_manifest(Path(args.out)))
    tell(f"wrote {args.out}: public + {len(args.experts)} experts, {routing.described()}")
    show_shares(shares)


def show_shares(shares: "Shares | None") -> None:
    """Prints the share of the anchor's public text that the router sends to each expert."""
    if shares is None:
        tell(
            "the anchor came without public text, so the share of it that the router sends to "
            "each expert is unknown"
        )
        return
    rows = [
        {
            "expert": row["expert"],
            **{key: f"{row[key]:.1%}" for key in ("mean", "largest")},
            "by layer": " ".join(f"{share:.0%}" for share in row["layers"]),
        }
        for row in shares.rows()
    ]
    show_table(rows, title=f"shares of {shares.tokens:,} tokens of the anchor's public text")
