"""Differentially private steps for the training loop: DP-SGD (Abadi et al., 2016).

Each step draws units by Poisson sampling, clips the gradient of each unit, sums, adds Gaussian
noise, and passes the sum over the mean batch size, a constant, to the optimizer. The ledger records
a step before it is taken. A step that a killed run had started is not repeated: its budget is
spent, so the run has one step less.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import ExpertTraining, PrivacyConfig, Training
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.data.units import Units
from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import BATCH, make_mesh, specs_of
from flexolmo_jax.privacy.accounting import Mechanism, epsilon
from flexolmo_jax.privacy.ledger import Ledger, Run
from flexolmo_jax.privacy.mechanism import (
    Clipping,
    Secret,
    batches,
    clipped_gradients,
    with_noise,
)
from flexolmo_jax.runtime.processes import on_main_process
from flexolmo_jax.training.loop import Diverged
from flexolmo_jax.training.objectives import Loss

EPSILON_UPDATES = 20  # evenly spaced over the run; between them the next (larger) value is shown
MIN_CHECKPOINTS = 20  # of a run: budget spent since the last checkpoint cannot be recovered


@functools.partial(
    jax.jit,
    static_argnames=("loss", "optimizer", "clip", "mechanism", "mesh"),
    donate_argnames=("trainable", "opt_state"),
)
def private_step(
    loss: Loss, optimizer, clip: Clipping, mechanism: Mechanism,
    trainable, opt_state, frozen, batch: Batch, key: jax.Array, *, mesh: Mesh | None = None,
):  # fmt: skip
    """One differentially private update of `trainable`.

    Args:
      loss, optimizer: of the stage.
      clip, mechanism: how units are clipped, and how much noise is added.
      trainable, opt_state: with a mesh, sharded as `mesh.specs` says; donated.
      frozen: replicated on every device.
      batch: of units, [U, W, S]; units without any weight are padding. With a mesh, the units are
        sharded over its devices.
      key: of this step's noise; secret, and never used again.
      mesh: the mesh of several devices, or None for one device.

    Returns:
      (trainable, opt_state, metrics). The metrics are float32: `grad_norm` is that of the private
      sum; `loss`, in nats per token, and `clipped`, the share of units whose gradient is longer
      than C, are NOT private.
    """

    def local(trainable, frozen, batch):
        is_empty = ~jnp.any(batch.weights > 0, axis=(1, 2))
        summed, metrics, norms = clipped_gradients(loss, clip, trainable, frozen, batch, is_empty)
        sums = {
            "loss": jnp.sum(metrics["loss"]),
            "tokens": jnp.sum(batch.weights),
            "clipped": jnp.sum(norms > clip.norm),
            "units": jnp.sum(~is_empty),
        }
        return collectives.psum_batch(summed), collectives.psum_batch(sums)

    specs, replicated = specs_of(trainable, mesh), P()
    summed, sums = placement.shard_map(local, mesh, (replicated, replicated, BATCH), replicated)(
        _reshard(trainable, mesh), frozen, batch
    )
    noised = with_noise(summed, mechanism.noise_multiplier, key)
    grads = _reshard(jax.tree.map(lambda x: x / mechanism.mean_batch, noised), mesh, specs)
    updates, opt_state = optimizer.update(grads, opt_state, trainable)
    metrics = {
        "loss": sums["loss"] / jnp.maximum(sums["tokens"], 1e-9),
        "clipped": sums["clipped"] / jnp.maximum(sums["units"], 1),
        "grad_norm": optax.tree.norm(grads),
    }
    return optax.apply_updates(trainable, updates), opt_state, metrics


def _reshard(tree: Any, mesh: Mesh | None, specs: Any = None) -> Any:
    """Reshards to `specs`, or replicates on every device."""
    if mesh is None:
        return tree
    if specs is None:
        return jax.tree.map(lambda x: jax.reshard(x, P()), tree)
    return jax.tree.map(jax.reshard, tree, specs)


class PrivateSteps:
    """Runs `private_step`, in place of `loop.StandardSteps`."""

    replicates_frozen = True  # each device computes the gradients of its own units

    def __init__(
        self,
        title: str,
        config: ExpertTraining,
        privacy: PrivacyConfig,
        loss: Loss,
        units: Units,
        ledger: Ledger,
        run: Run,
        delta: float,
    ):
        """`run` is the ledger's entry of this run; `delta` holds for all its epsilons."""
        self.title, self.privacy = title, privacy
        self.training: Training = config
        self.loss, self.units, self.ledger, self.run = loss, units, ledger, run
        self.mechanism = run.planned
        self.secret = Secret()
        self.mesh = make_mesh() if jax.device_count() > 1 else None
        self.clip = Clipping(privacy.clip, privacy.microbatch_size)
        self.save_every = min(config.checkpoint_every, max(1, config.steps // MIN_CHECKPOINTS))
        shape = (self.mechanism.mean_batch, privacy.windows, config.data.length)
        self.tokens_per_step = int(np.prod(shape))  # upper bound for the mean batch
        self._steps_of_updates = np.unique(
            np.linspace(0, config.steps, EPSILON_UPDATES + 1).round().astype(int)
        )
        without_rows = (
            Mechanism(**{**vars(self.mechanism), "steps": int(n), "rows_noise_multiplier": None})
            for n in self._steps_of_updates
        )
        self._epsilons = [epsilon([one], delta) for one in without_rows]

    def spent(self, step: int) -> float:
        """An upper bound, close to it, of epsilon after a step."""
        return self._epsilons[int(np.searchsorted(self._steps_of_updates, step))]

    def start(self, saved: int) -> int:
        """The step to resume after, given the step of the checkpoint.

        Raises:
          ValueError: all steps were begun, and none was saved.
        """
        if not saved and self.run.steps == self.training.steps:
            raise ValueError(
                f"{self.title}: all {self.training.steps} steps of this run were begun, and none "
                "was saved; their budget is spent. Start a new run in another folder"
            )
        return self.run.steps

    def batches(self, start: int) -> Iterator[Batch]:
        """A batch of units for each remaining step."""
        generator = self.secret.generator("training")
        shape = (self.mechanism.largest_batch, self.privacy.windows)
        num_shards = 1 if self.mesh is None else self.mesh.size
        for drawn in batches(self.mechanism, self.training.steps - start, generator):
            yield self.units.batch(drawn, shape, generator, num_shards)

    def take(self, step: int, optimizer, trainable, opt_state, frozen, batch: Batch):
        """Takes a step, after the ledger has recorded it."""
        on_main_process(lambda: self.ledger.spend(self.run.id, step, self.spent(step)))
        return private_step(
            self.loss, optimizer, self.clip, self.mechanism, trainable, opt_state, frozen, batch,
            self.secret.noise_key(step), mesh=self.mesh,
        )  # fmt: skip

    def divergence(self, step: int, metrics: dict[str, float], run: Path) -> Diverged | None:
        """Checks only the noised gradient: stopping on the private loss would leak it."""
        if np.isfinite(metrics["grad_norm"]):
            return None
        return Diverged("the gradient is not finite", "Start a new run with a lower learning rate")

    def status(self, step: int) -> str:
        """Shown beside the progress bar."""
        return f"epsilon {self.spent(step):.2f}/{self.privacy.epsilon:g}"
