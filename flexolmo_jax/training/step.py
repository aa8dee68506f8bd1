"""The losses of the three stages, and the one training step.

What is trained is the first argument and what is frozen another one: there is no gradient,
optimizer state or second copy of a frozen weight to guard against.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.modeling.experts import Experts, FeedForward
from flexolmo_jax.modeling.kernels.cross_entropy import cross_entropy
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.modeling.transformer import Anchor, Backbone, forward
from flexolmo_jax.parallel import collectives
from flexolmo_jax.training.gradients import gradients

# loss(trainable, frozen, batch) -> (value that is minimised, metrics), sums over the tokens by
# their weights: `train_step` hands over weights that sum to 1.
Loss = Callable[[Any, Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]


@functools.partial(
    jax.jit,
    static_argnames=("loss", "optimizer", "mesh", "microbatches"),
    donate_argnames=("trainable", "opt_state"),
)
def train_step(
    loss: Loss,
    optimizer,
    trainable,
    opt_state,
    frozen,
    batch: Batch,
    *,
    mesh=None,
    microbatches: int = 1,
):
    """One update of `trainable`.

    Args:
      loss, optimizer: what is done.
      trainable, opt_state, frozen, batch: with a mesh, placed on it (sharding.py).
      mesh: of several devices, or None.
      microbatches: gradient accumulation steps of each device; more of them use less memory.

    Returns:
      (trainable, opt_state, metrics): float32 scalars, among them loss and grad_norm.
    """
    batch = batch._replace(weights=batch.weights / jnp.maximum(jnp.sum(batch.weights), 1.0))
    metrics, grads = gradients(loss, mesh, trainable, frozen, batch, microbatches)
    updates, opt_state = optimizer.update(grads, opt_state, trainable)
    metrics["grad_norm"] = optax.tree.norm(grads)
    return optax.apply_updates(trainable, updates), opt_state, metrics


def language_model_loss(
    backbone: Backbone,
    stacks: tuple[Experts, ...],
    batch: Batch,
    config: ModelConfig,
    output_z_loss: float,
    router_z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy plus z-losses, weighted sums over the tokens of a batch.

    Returns:
      what is minimised, and {"loss": cross-entropy in nats}; means over tokens where the batch's
      weights sum to 1.
    """
    out = forward(backbone, stacks, batch.tokens, config, segments=batch.segments)
    shares = map(collectives.split_positions, (out.hidden, batch.targets, batch.weights))
    hidden, targets, weights = shares
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
    """Stage 1: everything is trained; one expert, so routing plays no part."""

    config: ModelConfig
    output_z_loss: float

    def __call__(self, anchor: Anchor, frozen: None, batch: Batch):
        return language_model_loss(
            anchor.backbone, (anchor.public,), batch, self.config, self.output_z_loss
        )


@dataclasses.dataclass(frozen=True)
class ExpertAloneLoss:
    """Stage 2, gate fixed to 1: the owner's feed-forward network answers alone."""

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
    """Stage 2, the paper's form: a softmax over the frozen public and the owner's expert."""

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
    """Stage 3: the rows of all experts and the biases of all but the public one."""

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
    """Not a stage: all weights of a mixture are trained, on pooled text (training/joint.py)."""

    config: ModelConfig
    output_z_loss: float
    router_z_loss: float

    def __call__(self, weights: tuple[Backbone, Experts], frozen: None, batch: Batch):
        backbone, experts = weights
        return language_model_loss(
            backbone, (experts,), batch, self.config, self.output_z_loss, self.router_z_loss
        )


class RouterRows(NamedTuple):
    """What stage 3 trains. The public expert's bias is 0 by definition, so it is not here."""

    row: jax.Array  # [L, E, D]
    bias: jax.Array  # [L, E - 1]

    @classmethod
    def of(cls, router: Router) -> "RouterRows":
        return cls(jnp.array(router.row[...]), jnp.array(router.bias[:, 1:]))

    def router(self, like: Router) -> Router:
        bias = jnp.pad(self.bias, ((0, 0), (1, 0)))
        return jax.tree.unflatten(jax.tree.structure(like), [bias, self.row])


def with_parts(like: Experts, feed_forward: FeedForward, router: Router) -> Experts:
    """A stack of the given parts, without changing `like`."""
    parts = {"feed_forward": feed_forward, "router": router}
    leaves = [leaf for name in sorted(parts) for leaf in jax.tree.leaves(parts[name])]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
