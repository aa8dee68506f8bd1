"""A baseline, not a stage: a mixture trained jointly on everybody's text.

The paper's "unrestricted" model: upcycled from the anchor; nothing is frozen, and all text is in
one place.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from flexolmo_jax.config import AnchorTraining
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor, write_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.modeling.experts import Experts, join, select, with_parts
from flexolmo_jax.modeling.transformer import Anchor
from flexolmo_jax.training.loop import StandardSteps, mesh_of, train
from flexolmo_jax.training.objectives import JointLoss
from flexolmo_jax.training.run import (
    alone_in_its_run,
    check_run,
    describe_run,
    package_facts,
    record_run,
)
from flexolmo_jax.training.starting_point import anchor_to_train_beside, in_float32

ROW_SCALE = 0.02  # standard deviation of the initial router rows
ROUTER_Z_LOSS = 1e-3


@alone_in_its_run
def train_jointly(
    config: AnchorTraining, *, anchor: Path, data: str, out: Path, run: Path, resume: bool = False
) -> None:
    """Trains all weights of a mixture and writes it as OUT/merged, of OUT/anchor and OUT/experts.

    Args:
      config: of the training; `config.model` has the number of experts and of active experts.
      anchor: each expert starts as a copy of its public expert, with random router rows.
      data: everybody's text, as `read_documents` takes it.
      out: a folder.
      run: folder of the run.
      resume: continue from the newest checkpoint in `run`.

    Raises:
      ValueError: an argument or a file is wrong; the message says what to do.
      FloatingPointError: the training diverged.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
      AlreadyDone: the package exists.
    """
    loaded, tokenizer = anchor_to_train_beside(anchor, config.data)
    mesh_of(config)  # raises if the batch cannot be divided among the devices
    wanted = describe_run(config, data, anchor=loaded.identity)
    check_run(run, wanted, resume, config, out)
    source, _ = prepare(data, config.data, tokenizer, run / "data")
    record_run(run, wanted)
    weights = in_float32(loaded.weights)
    public = with_parts(weights.public, head=None, evidence=None)
    experts = _upcycled(public, config.model.num_experts, config.seed)
    loss = JointLoss(config.computing(config.model), config.output_z_loss, ROUTER_Z_LOSS)
    steps = StandardSteps("unrestricted", config, loss, source)
    trained = train(steps, (weights.backbone, experts), None, run)
    _write(config, loaded, trained, out)


def _upcycled(public: Experts, count: int, seed: int) -> Experts:
    """`count` copies of the public expert, with random router rows."""
    experts = join(*[public] * count)
    shape = experts.router.row[...].shape
    experts.router.row[...] = ROW_SCALE * jax.random.normal(jax.random.key(seed), shape)
    experts.router.bias[...] = jnp.zeros_like(experts.router.bias[...])
    return experts


def _write(config: AnchorTraining, start: LoadedAnchor, trained: tuple, out: Path) -> None:
    backbone, experts = trained
    facts = package_facts(config)
    assert start.tokenizer is not None
    public = Anchor(backbone, select(experts, [0]))
    write_anchor(out / "anchor", public, start.config, start.tokenizer, [], facts)
    packages = [out / "experts" / f"expert_{i}" for i in range(1, config.model.num_experts)]
    anchor = read_anchor(out / "anchor", on_disk=True)
    for index, package in enumerate(packages, 1):
        expert = select(experts, [index])
        write_expert(package, expert, package.name, anchor, {**facts, "gating": "joint"})
    merge(
        out / "anchor",
        packages,
        out / "merged",
        active_experts=config.model.active_experts,
        memory=None,
        allow_share=None,
    )
