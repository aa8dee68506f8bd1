"""`flexolmo plan`: the memory and time of a training or inference step on TPUs."""

import argparse

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
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from flexolmo_jax.config import Training
    from flexolmo_jax.planning.plan import make_plan, model_of, stage_of

    config = read_config(args, Training)
    stage = stage_of(config, args.stage)
    plan = make_plan(config, model_of(args.config, config), stage, args.topology)
    if args.json:
        print_json(plan.values())
    else:
        show_fields(dict(plan.rows()), f"{args.config}: {stage} on {args.topology}, per chip")
