"""The share of public text that honest experts take, and others; for the table of security.md.

    python flexolmo_jax/studies/shares.py flexolmo_demo

DEMO is what `flexolmo demo` wrote. Every merge of one to four of its experts is measured, with and
without the router's memory, and then experts whose rows were changed to take more.
"""

import argparse
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import MEMORY
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import read_expert
from flexolmo_jax.federation.shares import measure_shares

OWNERS = ("code", "math", "educational", "creative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", type=Path)
    demo = parser.parse_args().demo
    anchor = read_anchor(demo / "anchor")
    experts = {name: read_expert(demo / "experts" / name, anchor) for name in OWNERS}

    def largest(names, memory, routers):
        config = anchor.config.replace(num_experts=len(names) + 1, memory=memory)
        own = [anchor.weights.public.router, *(routers[name] for name in names)]
        found = measure_shares(anchor, own, ("public", *names), config)
        return found.of_layers[:, 1:].max(axis=0)  # of each expert, over the layers

    honest = {name: expert.router for name, expert in experts.items()}
    print("| experts | memory | merges | median | largest |\n| --- | --- | ---: | ---: | ---: |")
    for memory in (MEMORY, None):
        for count in range(1, len(OWNERS) + 1):
            merges = list(itertools.combinations(OWNERS, count))
            found = np.concatenate([largest(names, memory, honest) for names in merges])
            print(
                f"| {count} | {'yes' if memory else 'no'} | {len(merges)} "
                f"| {np.median(found):.1%} | {found.max():.1%} |"
            )
    changed = {f"row times {factor}": _times(honest["creative"], factor) for factor in (3, 10, 100)}
    changed["row along the mean input"] = _along_the_mean(demo, honest["creative"])
    print("\n| creative, of four | with memory | without |\n| --- | ---: | ---: |")
    for what, router in {"honest": honest["creative"], **changed}.items():
        others = {**honest, "creative": router}
        with_memory, without = (largest(OWNERS, m, others)[-1] for m in (MEMORY, None))
        print(f"| {what} | {with_memory:.1%} | {without:.1%} |")
    started = time.perf_counter()
    largest(OWNERS, MEMORY, honest)
    print(f"\n{time.perf_counter() - started:.1f} s once compiled")


def _times(router, factor: float):
    made = jax.tree.map(jnp.array, router)
    made.row[...] = made.row[...] * factor
    return made


def _along_the_mean(demo: Path, router):
    """Rows that give about 10 for every input: what an owner can make from public text alone."""
    from flexolmo_jax.training.public_data import public_batch
    from flexolmo_jax.training.router_fit.inputs import of_the_anchor, whitened_by

    anchor = read_anchor(demo / "anchor")
    batch = public_batch(anchor.public_text, anchor.tokenizer, 128, 32)
    white = whitened_by(batch, anchor.weights, of_the_anchor(anchor.config))
    made = jax.tree.map(jnp.array, router)
    made.row[...] = (
        10 * jnp.asarray(np.stack([one.constant for one in white]), jnp.float32)[:, None]
    )
    made.bias[...] = jnp.zeros_like(made.bias[...])
    return made


if __name__ == "__main__":
    main()
