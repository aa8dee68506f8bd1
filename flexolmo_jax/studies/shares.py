"""The share of public text that honest experts take, and that experts with changed rows take.

    flexolmo study shares flexolmo_demo

DEMO is the folder that `flexolmo demo` wrote. Every merge of one to four of its experts is
measured, with and without the router's memory, and then merges in which one expert's rows were
changed to take more. The tables are those of docs/security.md.
"""

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import MEMORY
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor
from flexolmo_jax.federation.expert import read_expert
from flexolmo_jax.federation.shares import measure_shares
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.studies.demo import OWNERS
from flexolmo_jax.studies.engine.report import table
from flexolmo_jax.training.public_data import public_batch
from flexolmo_jax.training.router_fit.inputs import of_the_anchor, whitened_by

CHANGED = "creative"  # the owner whose rows are changed
FACTORS = (3, 10, 100)
Memory = tuple[float, float] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study shares`."""
    parser.add_argument("demo", type=Path, help="the folder of a demo")


def run(args: argparse.Namespace) -> None:
    """Measures all merges and prints two tables, and how long one measurement takes."""
    anchor = read_anchor(args.demo / "anchor")
    experts = {name: read_expert(args.demo / "experts" / name, anchor) for name in OWNERS}
    honest = {name: expert.router for name, expert in experts.items()}
    head = ["experts", "memory", "merges", "median", "largest"]
    print("\n".join(table(head, honest_rows(anchor, honest), "llr")))
    head = [f"{CHANGED}, of {len(OWNERS)}", "with memory", "without"]
    print("\n".join(["", *table(head, changed_rows(anchor, honest))]))
    started = time.perf_counter()
    largest_shares(anchor, honest, OWNERS, MEMORY)
    print(f"\n{time.perf_counter() - started:.1f} s once compiled")


def largest_shares(
    anchor: LoadedAnchor, routers: Mapping[str, Router], names: Sequence[str], memory: Memory
) -> np.ndarray:
    """The largest share that each expert takes in any layer: float64 [experts].

    Args:
      anchor: brings the public text.
      routers: rows and biases by owner.
      names: of the owners that are merged.
      memory: of the merged router.
    """
    config = anchor.config.replace(num_experts=len(names) + 1, memory=memory)
    own = [anchor.weights.public.router, *(routers[name] for name in names)]
    shares = measure_shares(anchor, [], ("public", *names), config, own)
    if shares is None:
        raise ValueError("the demo's anchor has no public text to route; run the demo again")
    return shares.of_layers[:, 1:].max(axis=0)


def honest_rows(anchor: LoadedAnchor, honest: Mapping[str, Router]) -> list[list[str]]:
    """The table of all merges, by number of experts, with and without memory."""
    rows = []
    for memory in (MEMORY, None):
        for count in range(1, len(honest) + 1):
            merges = list(itertools.combinations(honest, count))
            shares = np.concatenate([largest_shares(anchor, honest, m, memory) for m in merges])
            sizes = [str(count), "yes" if memory else "no", str(len(merges))]
            rows.append([*sizes, f"{np.median(shares):.1%}", f"{shares.max():.1%}"])
    return rows


def changed_rows(anchor: LoadedAnchor, honest: Mapping[str, Router]) -> list[list[str]]:
    """The table of merges of all experts in which one has other rows."""
    router = honest[CHANGED]
    changed = {"honest": router}
    changed |= {f"row times {factor}": scaled(router, factor) for factor in FACTORS}
    changed["row along the mean input"] = along_the_mean_input(anchor, router)
    names = [*(name for name in honest if name != CHANGED), CHANGED]  # the changed one is last
    rows = []
    for title, router in changed.items():
        routers = {**honest, CHANGED: router}
        shares = (largest_shares(anchor, routers, names, m)[-1] for m in (MEMORY, None))
        rows.append([title, *(f"{share:.1%}" for share in shares)])
    return rows


def scaled(router: Router, factor: float) -> Router:
    """A copy whose rows are `factor` times as long."""
    copy = jax.tree.map(jnp.array, router)
    copy.row[...] = copy.row[...] * factor
    return copy


def along_the_mean_input(anchor: LoadedAnchor, router: Router) -> Router:
    """Rows that give about 10 for every input: what an owner can make from public text only."""
    assert anchor.tokenizer is not None
    length = min(128, anchor.config.max_length)
    batch = public_batch(anchor.public_text, anchor.tokenizer, length, 32)
    inputs = whitened_by(batch, anchor.weights, of_the_anchor(anchor.config))
    constant = np.stack([layer.constant for layer in inputs])
    copy = jax.tree.map(jnp.array, router)
    copy.row[...] = 10 * jnp.asarray(constant, jnp.float32)[:, None]
    copy.bias[...] = jnp.zeros_like(copy.bias[...])
    return copy
