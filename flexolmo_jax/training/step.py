"""The training step without differential privacy: gradient, then optimizer update.

What is trained and what is frozen are two arguments: there is no gradient, optimizer state or
second copy of a frozen weight to guard against.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from flexolmo_jax.data.batches import Batch
from flexolmo_jax.training.gradients import gradients
from flexolmo_jax.training.objectives import Loss


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
      loss, optimizer: of the stage (`objectives.py`, `optimizer.py`).
      trainable, opt_state, frozen: with a mesh, sharded as `mesh.specs` says; the first two are
        donated.
      batch: with a mesh, sharded as `mesh.BATCH`.
      mesh: the mesh of several devices, or None for one device.
      microbatches: gradient accumulation steps per device; more of them use less memory.

    Returns:
      (trainable, opt_state, metrics); metrics are float32 scalars, among them loss and grad_norm.
    """
    batch = batch._replace(weights=batch.weights / jnp.maximum(jnp.sum(batch.weights), 1.0))
    metrics, grads = gradients(loss, mesh, trainable, frozen, batch, microbatches)
    updates, opt_state = optimizer.update(grads, opt_state, trainable)
    metrics["grad_norm"] = optax.tree.norm(grads)
    return optax.apply_updates(trainable, updates), opt_state, metrics
