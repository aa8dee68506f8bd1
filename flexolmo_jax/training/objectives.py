"""What each stage trains, what it freezes, and the loss it minimises.

`anchor_parts`, `expert_parts` and `router_parts` are the only places that say so: training, the
planner, the audits' positive controls and the benchmarks all call them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flexolmo_jax.config import (
    EvidenceTraining,
    ExpertTraining,
    ModelConfig,
    RouterTraining,
    Training,
)
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.modeling.experts import Experts, FeedForward, with_base, with_parts
from flexolmo_jax.modeling.heads import LowRankHead
from flexolmo_jax.modeling.kernels.cross_entropy import cross_entropy
from flexolmo_jax.modeling.low_rank import LowRankFeedForward
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.modeling.transformer import Anchor, Backbone, forward, head_columns
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
        return StageParts(ExpertAloneLoss(model, config.output_z_loss), OwnParts.of(expert), frozen)
    loss = ExpertPairLoss(model.replace(num_experts=2), config.output_z_loss, config.router_z_loss)
    return StageParts(loss, expert, anchor)


def trained_expert(config: ExpertTraining, expert: Experts, trained: Any) -> Experts:
    """The expert after stage 2: `expert` with what `expert_parts` made trainable replaced."""
    return trained.expert(expert, expert.router) if config.gating == "fixed" else trained


def evidence_parts(
    config: EvidenceTraining, model: ModelConfig, backbone: Backbone, head: LowRankHead
) -> StageParts:
    """A public evidence head for an anchor that exists.

    Args:
      config: the stage's config.
      model: of the anchor.
      backbone: the frozen weights; its layers are not needed.
      head: the initial head, of one expert.
    """
    below = with_parts(backbone, layers=None)
    return StageParts(EvidenceLoss(config.computing(model)), head, below)


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
    hidden, matrix = head_columns(backbone, stacks, out, config)
    total, nats = _cross_entropy(hidden, matrix, batch, config, output_z_loss)
    if router_z_loss and out.router_logits is not None:
        z = jax.nn.logsumexp(out.router_logits, axis=1)  # [L, B, S]
        total += router_z_loss * jnp.sum(jnp.mean(z**2, axis=0) * batch.weights)
    return total, {"loss": nats}


def evidence_loss(
    backbone: Backbone, evidence: LowRankHead, batch: Batch, config: ModelConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of a bigram model (modeling/evidence.py): it trains beside the network.

    Nothing flows into the backbone, so the two losses add up without touching each other's weights.

    Args:
      backbone: the weights below; frozen here.
      evidence: the head to train, of one expert.
      batch, config: as in `language_model_loss`.
    """
    embed, matrix = jax.lax.stop_gradient((backbone.embed[...], backbone.head_matrix(config)))
    embedded = collectives.embedding_lookup(embed, batch.tokens, config)
    hidden = jax.lax.stop_gradient(backbone.norm(embedded, config.norm_eps))
    columns, rows = evidence.columns(hidden)
    hidden = jnp.concatenate([hidden, columns], axis=-1)
    matrix = jnp.concatenate([matrix.astype(hidden.dtype), rows])
    total, nats = _cross_entropy(hidden, matrix, batch, config, 0.0)
    return total, {"evidence_loss": nats}


def _cross_entropy(hidden, matrix, batch: Batch, config: ModelConfig, z_loss: float):
    hidden, targets, weights = map(
        collectives.split_positions, (hidden, batch.targets, batch.weights)
    )
    sums = cross_entropy(hidden, matrix, targets, weights, z_loss=z_loss, chunk=config.loss_chunk)
    return collectives.reduce_from_tensor_parallel(sums)


def _with_evidence(found, backbone: Backbone, part: Any, batch: Batch, config: ModelConfig):
    """A loss and its metrics, and those of the evidence head of `part` if it has one."""
    if getattr(part, "evidence", None) is None:
        return found
    (total, metrics), (more, of_evidence) = (
        found, evidence_loss(backbone, part.evidence, batch, config)
    )  # fmt: skip
    return total + more, {**metrics, **of_evidence}


@dataclasses.dataclass(frozen=True)
class AnchorLoss:
    """Stage 1: one expert, so routing does not matter."""

    config: ModelConfig
    output_z_loss: float

    def __call__(self, anchor: Anchor, frozen: None, batch: Batch):
        found = language_model_loss(
            anchor.backbone, (anchor.public,), batch, self.config, self.output_z_loss
        )
        return _with_evidence(found, anchor.backbone, anchor.public, batch, self.config)


@dataclasses.dataclass(frozen=True)
class ExpertAloneLoss:
    """Stage 2, gate fixed to 1: the owner's expert replaces the public one."""

    config: ModelConfig
    output_z_loss: float

    def __call__(self, own: "OwnParts", frozen: tuple[Anchor, Router], batch: Batch):
        anchor, router = frozen
        expert = with_base(own.expert(anchor.public, router), anchor.public)
        found = language_model_loss(
            anchor.backbone, (expert,), batch, self.config, self.output_z_loss
        )
        return _with_evidence(found, anchor.backbone, own, batch, self.config)


@dataclasses.dataclass(frozen=True)
class ExpertPairLoss:
    """Stage 2 as in the paper: a softmax over the frozen public and the owner's expert."""

    config: ModelConfig
    output_z_loss: float
    router_z_loss: float

    def __call__(self, expert: Experts, anchor: Anchor, batch: Batch):
        found = language_model_loss(
            anchor.backbone,
            (anchor.public, with_base(expert, anchor.public)),
            batch,
            self.config,
            self.output_z_loss,
            self.router_z_loss,
        )
        return _with_evidence(found, anchor.backbone, expert, batch, self.config)


@dataclasses.dataclass(frozen=True)
class EvidenceLoss:
    """Of a public evidence head alone."""

    config: ModelConfig

    def __call__(self, head: LowRankHead, backbone: Backbone, batch: Batch):
        total, metrics = evidence_loss(backbone, head, batch, self.config)
        return total, {"loss": metrics["evidence_loss"]}


@dataclasses.dataclass(frozen=True)
class RouterLoss:
    """Stage 3: the router rows of all experts, and the biases of all but the public one."""

    config: ModelConfig
    output_z_loss: float
    router_z_loss: float

    def __call__(self, rows: "RouterRows", frozen: tuple[Backbone, Experts], batch: Batch):
        backbone, experts = frozen
        merged = with_parts(experts, router=rows.router(experts.router))
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


class OwnParts(NamedTuple):
    """What stage 2 trains with a fixed gate: all of an expert but its router rows."""

    feed_forward: FeedForward | LowRankFeedForward
    head: LowRankHead | None
    evidence: LowRankHead | None

    @classmethod
    def of(cls, expert: Experts) -> "OwnParts":
        """The parts that an expert has."""
        assert isinstance(expert.feed_forward, FeedForward | LowRankFeedForward)
        parts = (getattr(expert, name, None) for name in ("head", "evidence"))
        return cls(expert.feed_forward, *parts)

    def expert(self, like: Experts, router: Router) -> Experts:
        """A stack of these parts and the given router; `like` is not changed."""
        return with_parts(like, router=router, **self._asdict())


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
