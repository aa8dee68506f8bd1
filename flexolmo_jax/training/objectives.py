"""What each stage trains, what it freezes, and the loss it minimises.

`anchor_parts`, `expert_parts` and `router_parts` are the only places that say so: training, the
planner, the audits' positive controls and the benchmarks all call them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flexolmo_jax.config import ExpertTraining, ModelConfig, RouterTraining, Training
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.modeling.experts import Experts, FeedForward
from flexolmo_jax.modeling.kernels.cross_entropy import cross_entropy
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.modeling.transformer import Anchor, Backbone, forward
from flexolmo_jax.parallel import collectives
from flexolmo_jax.storage import tensors

# loss(trainable, frozen, batch) -> (value to minimise, metrics). Both are sums over the tokens,
# weighted by `batch.weights`; `train_step` passes weights that sum to 1.
Loss = Callable[[Any, Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]


class StageParts(NamedTuple):
    """What defines a stage; its trees hold arrays, or only their shapes."""

    loss: Loss
    trainable: Any
    frozen: Any


def anchor_parts(config: Training, model: ModelConfig, anchor: Anchor) -> StageParts:
    """Stage 1 trains every weight of the public model.

    Args:
      config: the stage's config.
      model: of the anchor.
      anchor: the initial weights.
    """
    return StageParts(AnchorLoss(config.computing(model), config.output_z_loss), anchor, None)


def expert_parts(
    config: ExpertTraining, model: ModelConfig, anchor: Anchor, expert: Experts
) -> StageParts:
    """Stage 2 trains an owner's expert beside the frozen anchor.

    Args:
      config: the stage's config; its `gating` decides whether the router rows are trained too.
      model: of the anchor.
      anchor: the frozen weights.
      expert: the initial weights of the expert, a stack of one.
    """
    model = config.computing(model)
    if config.gating == "fixed":
        frozen = (anchor, anchor.public.router)
        return StageParts(ExpertAloneLoss(model, config.output_z_loss), expert.feed_forward, frozen)
    loss = ExpertPairLoss(model.replace(num_experts=2), config.output_z_loss, config.router_z_loss)
    return StageParts(loss, expert, anchor)


def trained_expert(config: ExpertTraining, expert: Experts, trained: Any) -> Experts:
    """The expert after stage 2: `expert` with what `expert_parts` made trainable replaced."""
    return with_parts(expert, trained, expert.router) if config.gating == "fixed" else trained


def router_parts(
    config: RouterTraining, model: ModelConfig, backbone: Backbone, experts: Experts, rows: Any
) -> StageParts:
    """Stage 3 trains the router rows of a merged model.

    Args:
      config: the stage's config.
      model: of the merged model.
      backbone, experts: the frozen weights.
      rows: the initial `RouterRows`, of the real experts and of empty ones that pad the stack.
    """
    loss = RouterLoss(config.computing(model), config.output_z_loss, config.router_z_loss)
    return StageParts(loss, rows, (backbone, experts))


def language_model_loss(
    backbone: Backbone,
    stacks: tuple[Experts, ...],
    batch: Batch,
    config: ModelConfig,
    output_z_loss: float,
    router_z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy plus z-losses, as weighted sums over the tokens of a batch.

    Args:
      backbone, stacks: the weights; the stacks are joined along the expert axis.
      batch: [B, S]; if its weights sum to 1, the sums are means.
      config: of the model.
      output_z_loss, router_z_loss: coefficients.

    Returns:
      the value to minimise, and {"loss": cross-entropy in nats}; float32 scalars.
    """
    out = forward(backbone, stacks, batch.tokens, config, segments=batch.segments)
    hidden, targets, weights = map(
        collectives.split_positions, (out.hidden, batch.targets, batch.weights)
    )
    sums = cross_entropy(
        hidden,
        backbone.head_matrix(config),
        targets,
        weights,
        z_loss=output_z_loss,
        chunk=config.loss_chunk,
    )
    total, nats = collectives.reduce_from_tensor_parallel(sums)
    if router_z_loss:
        z = jax.nn.logsumexp(out.router_logits, axis=1)  # [L, B, S]
        total += router_z_loss * jnp.sum(jnp.mean(z**2, axis=0) * batch.weights)
    return total, {"loss": nats}


@dataclasses.dataclass(frozen=True)
class AnchorLoss:
    """Stage 1: one expert, so routing does not matter."""

    config: ModelConfig
    output_z_loss: float

    def __call__(self, anchor: Anchor, frozen: None, batch: Batch):
        return language_model_loss(
            anchor.backbone, (anchor.public,), batch, self.config, self.output_z_loss
        )


@dataclasses.dataclass(frozen=True)
class ExpertAloneLoss:
    """Stage 2, gate fixed to 1: the owner's feed-forward network replaces the public one."""

    config: ModelConfig
    output_z_loss: float

    def __call__(self, feed_forward: FeedForward, frozen: tuple[Anchor, Router], batch: Batch):
        anchor, router = frozen
        expert = with_parts(anchor.public, feed_forward, router)
        return language_model_loss(
            anchor.backbone, (expert,), batch, self.config, self.output_z_loss
        )


@dataclasses.dataclass(frozen=True)
class ExpertPairLoss:
    """Stage 2 as in the paper: a softmax over the frozen public and the owner's expert."""

    config: ModelConfig
    output_z_loss: float
    router_z_loss: float

    def __call__(self, expert: Experts, anchor: Anchor, batch: Batch):
        return language_model_loss(
            anchor.backbone,
            (anchor.public, expert),
            batch,
            self.config,
            self.output_z_loss,
            self.router_z_loss,
        )


@dataclasses.dataclass(frozen=True)
class RouterLoss:
    """Stage 3: the router rows of all experts, and the biases of all but the public one."""

    config: ModelConfig
    output_z_loss: float
    router_z_loss: float

    def __call__(self, rows: "RouterRows", frozen: tuple[Backbone, Experts], batch: Batch):
        backbone, experts = frozen
        merged = with_parts(experts, experts.feed_forward, rows.router(experts.router))
        return language_model_loss(
            backbone, (merged,), batch, self.config, self.output_z_loss, self.router_z_loss
        )


@dataclasses.dataclass(frozen=True)
class JointLoss:
    """Not a stage, a baseline: all weights of a mixture, on pooled text (stages/joint.py)."""

    config: ModelConfig
    output_z_loss: float
    router_z_loss: float

    def __call__(self, weights: tuple[Backbone, Experts], frozen: None, batch: Batch):
        backbone, experts = weights
        return language_model_loss(
            backbone, (experts,), batch, self.config, self.output_z_loss, self.router_z_loss
        )


class RouterRows(NamedTuple):
    """What stage 3 trains. The public expert's bias is 0 by definition, so it is left out."""

    row: jax.Array  # [L, E, D]
    bias: jax.Array  # [L, E - 1]

    @classmethod
    def of(cls, router: Router) -> "RouterRows":
        """A copy of a router's rows and biases."""
        return cls(jnp.array(router.row[...]), jnp.array(router.bias[:, 1:]))

    def router(self, like: Router) -> Router:
        """A router of these rows and biases, and a bias of 0 for the public expert."""
        bias = jnp.pad(self.bias, ((0, 0), (1, 0)))
        return tensors.refill(like, {"row": self.row, "bias": bias})


def with_parts(like: Experts, feed_forward: FeedForward, router: Router) -> Experts:
    """A stack of the given feed-forward networks and router; `like` is not changed."""
    parts = tensors.named({"feed_forward": feed_forward, "router": router})
    return tensors.refill(like, parts)
