"""What weights in fewer bits cost: bits per byte of the demo's merged model in each dtype.

flexolmo demo
flexolmo study rounding flexolmo_demo
"""

import argparse
import datetime
from pathlib import Path

from flexolmo_jax.config import ExpertTraining, load_config
from flexolmo_jax.evaluation.bits_per_byte import heldout_documents, score
from flexolmo_jax.model import load
from flexolmo_jax.studies.demo import OWNERS
from flexolmo_jax.studies.engine.report import add_page_argument, table, write_page

DTYPES = ("float32", "bfloat16", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study rounding`."""
    parser.add_argument("demo", type=Path, help="the folder of a demo")
    add_page_argument(parser, "rounding.md")


def run(args: argparse.Namespace) -> None:
    """Scores the merged model in each dtype, and writes the page."""
    data = load_config("demo_expert", ExpertTraining).data
    texts = {name: heldout_documents(f"corpus:{name}", data) for name in ("public", *OWNERS)}
    unrounded: dict[str, float] = {}
    rows = []
    for dtype in DTYPES:
        model = load(args.demo / "merged", dtype=dtype)
        cells = []
        for name, documents in texts.items():
            bits = score(model, documents).bits_per_byte
            change = bits / unrounded.setdefault(name, bits) - 1
            cells.append(f"{bits:.4f} ({change:+.2%})")
        rows.append([dtype, *cells])
    lines = [
        "# Weights in fewer bits",
        "",
        f"`flexolmo study rounding flexolmo_demo`, {datetime.date.today()}: bits per byte of the "
        "merged model that `flexolmo demo` leaves, on held-out documents, and the change from "
        "float32. `bfloat16` rounds weights and activations; `int8` rounds the matrices only, with "
        "a scale for each output channel. How fast each decodes is in "
        "[benchmarks.md](benchmarks.md).",
        "",
        *table(["dtype", *texts], rows),
    ]
    write_page(args.page, lines)
