"""The program that each stage runs, with shapes in place of arrays: what the planner compiles."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import ExpertTraining, ModelConfig, RouterTraining, Training
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.federation.loading import join_experts
from flexolmo_jax.inference import decode
from flexolmo_jax.inference.sampling import Sampling
from flexolmo_jax.modeling.decode_state import EvidenceState, KVCache
from flexolmo_jax.modeling.experts import Experts, Ranks
from flexolmo_jax.modeling.transformer import Anchor, abstract_model, init_anchor
from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import AXES, BATCH, EXPERT, SERVING, shardings, specs
from flexolmo_jax.planning.owners import Owners, ranks_of
from flexolmo_jax.training.objectives import (
    RouterLoss,
    RouterRows,
    StageParts,
    anchor_parts,
    expert_parts,
    router_parts,
)
from flexolmo_jax.training.optimizer import make_optimizer
from flexolmo_jax.training.starting_point import initial_expert
from flexolmo_jax.training.step import train_step

STAGES = ("anchor", "expert", "router", "forward", "decode")


class StageProgram(NamedTuple):
    """A jitted function and the shapes of its arguments, sharded over a mesh."""

    function: Any
    arguments: tuple[Any, ...]
    named_arguments: dict[str, Any]

    def lower(self) -> Any:
        """Traces and lowers it."""
        return self.function.lower(*self.arguments, **self.named_arguments)


def stage_program(
    config: Training, model: ModelConfig, stage: str, mesh: Mesh, owners: Owners
) -> StageProgram:
    """The program of a stage.

    Args:
      config: of the stage.
      model: as the config computes it.
      stage: one of STAGES.
      mesh: of the topology's devices.
      owners: of the merged model, for the stages that have one.
    """
    if stage == "decode":
        return _decode(config, model, mesh, owners)
    shape = (config.data.batch_size, config.data.length)
    rows = functools.partial(jax.ShapeDtypeStruct, shape, sharding=NamedSharding(mesh, BATCH))
    shapes: tuple[Any, ...] = (*(rows(jnp.int32) for _ in range(3)), rows(jnp.float32))
    batch = Batch(*shapes)
    if stage == "forward":
        backbone, experts = _sharded(_merged_weights(model, mesh, owners), mesh)
        run = jax.jit(functools.partial(_forward, loss=RouterLoss(model, 0.0, 0.0), mesh=mesh))
        return StageProgram(run, (backbone, experts, batch), {})
    loss, trainable, frozen = _stage_parts(config, model, mesh, owners)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = _sharded(jax.eval_shape(optimizer.init, trainable), mesh)
    trainable, frozen = _sharded(trainable, mesh), _sharded(frozen, mesh)
    named = {"mesh": mesh, "microbatches": config.microbatches}
    return StageProgram(train_step, (loss, optimizer, trainable, state, frozen, batch), named)


def _forward(backbone, experts, batch: Batch, *, loss: RouterLoss, mesh: Mesh):
    def local(backbone, experts, batch):
        rows = RouterRows.of(experts.router)
        return collectives.psum_batch(loss(rows, (backbone, experts), batch)[1])

    where = (*specs((backbone, experts), mesh), BATCH)
    return placement.shard_map(local, mesh, where, P())(backbone, experts, batch)


def _stage_parts(config: Training, model: ModelConfig, mesh: Mesh, owners: Owners) -> StageParts:
    """The parts of a config's own stage, with shapes in place of weights."""
    if isinstance(config, RouterTraining):
        backbone, experts = _merged_weights(model, mesh, owners)
        rows = jax.eval_shape(RouterRows.of, experts.router)
        return router_parts(config, model, backbone, experts, rows)
    model = model.replace(num_experts=1, evidence=None)  # nothing is routed in training
    ranks = Ranks(evidence=ranks_of(config).evidence)
    anchor: Anchor = jax.eval_shape(lambda key: init_anchor(model, key, ranks), jax.random.key(0))
    if isinstance(config, ExpertTraining):
        start = jax.eval_shape(lambda x: initial_expert(config, model, x), anchor.public)
        return expert_parts(config, model, anchor, start)
    return anchor_parts(config, model, anchor)


def _merged_weights(model: ModelConfig, mesh: Mesh, owners: Owners) -> tuple[Any, Experts]:
    """Shapes of the merged model as it is loaded onto a mesh."""
    backbone, public = abstract_model(model.replace(num_experts=1), owners.ranks)
    ordered = sorted(owners.deltas, key=lambda own: own or ())
    stacks = [
        jax.eval_shape(
            lambda key, own=own: Experts(model, 1, key, owners.ranks, own), jax.random.key(0)
        )
        for own in ordered
    ]
    experts, _ = join_experts([public, *stacks], mesh.shape[EXPERT])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), experts)
    return backbone, shapes


def _sharded(tree: Any, mesh: Mesh, over: tuple[str, ...] = AXES) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree, shardings(tree, mesh, over),
    )  # fmt: skip


def _decode(config: Training, model: ModelConfig, mesh: Mesh, owners: Owners) -> StageProgram:
    """The loop over new tokens; weights are in the dtype of the activations."""
    batch, length = config.data.batch_size, config.data.length

    def abstract(shape, dtype, *spec):
        where = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), _merged_weights(model, mesh, owners)
    )
    weights = _sharded(weights, mesh, SERVING)
    num_experts = weights[1].router.bias.shape[1]
    shape = (model.num_layers, batch, model.kv_heads, length, model.head_size)
    axes = AXES
    cache = KVCache(*(abstract(shape, model.dtype, None, axes) for _ in range(2)))
    state = decode.Generation(
        abstract((), jnp.int32),
        abstract((batch, model.vocab_size), jnp.float32, axes),
        abstract((batch,), jnp.bool_, axes),
        cache,
        model.memory
        and abstract((model.num_layers, num_experts, batch), jnp.float32, None, None, axes),
        model.evidence
        and EvidenceState(
            abstract((num_experts, batch), jnp.float32, None, axes),
            abstract((batch,), jnp.int32, axes),
        ),
        abstract((batch, decode.BUCKET), jnp.int32, axes),
    )
    arguments = (
        weights, state, abstract((batch,), jnp.int32, axes),
        abstract((batch, num_experts), jnp.bool_, axes),
        jax.eval_shape(jax.random.key, 0), abstract((1,), jnp.int32), decode.BUCKET,
    )  # fmt: skip
    named = {"config": model, "sampling": Sampling(0.0, None, None), "mesh": mesh}
    return StageProgram(decode.decode, arguments, named)
