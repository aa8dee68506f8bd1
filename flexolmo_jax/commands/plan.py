"""`flexolmo plan`: the memory and time of a training or inference step on TPUs."""

import argparse
import dataclasses
from pathlib import Path

from flexolmo_jax.commands.config_options import add_config, read_config
from flexolmo_jax.commands.parser import Commands
from flexolmo_jax.commands.shared_arguments import add_json
from flexolmo_jax.planning.chips import KINDS
from flexolmo_jax.runtime.console import print_json, show_fields


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "plan",
        run,
        "estimate memory and step time on a TPU topology (no TPU needed)",
        "Compiles the real step of a config ahead of time, and reports its cost per chip",
    )
    add_config(parser, "as for train; a config of an expert or a router must set `model` too")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help=f"TPU chips, as v5p:4x4x4 or v5e:16x16; the smallest of each kind: {KINDS}",
    )
    parser.add_argument(
        "--stage",
        choices=("anchor", "expert", "router", "forward", "decode"),
        help="default: the config's own; forward and decode use only its model",
    )
    parser.add_argument(
        "--rank", type=int, metavar="R",
        help="the rank of the deltas that the experts are, 0 for full ones (default: the config's "
        "ffn_rank)",
    )  # fmt: skip
    parser.add_argument(
        "--expert", nargs="+", default=[], action="extend", metavar="DIR",
        help="packages to be merged, each of its own rank, in place of the config's equal experts",
    )  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import ExpertTraining, Training
    from flexolmo_jax.planning.plan import make_plan, model_of, owners_of, stage_of

    config = read_config(args, Training)
    if args.rank is not None and isinstance(config, ExpertTraining):
        config = dataclasses.replace(config, ffn_rank=args.rank)
    stage, model = stage_of(config, args.stage), model_of(args.config, config)
    if args.expert:
        model = model.replace(num_experts=len(args.expert) + 1)
    owners = owners_of(config, model, stage, args.rank, [Path(path) for path in args.expert])
    plan = make_plan(config, model, stage, args.topology, owners)
    if args.json:
        print_json(plan.values())
    else:
        show_fields(dict(plan.rows()), f"{args.config}: {stage} on {args.topology}, per chip")
