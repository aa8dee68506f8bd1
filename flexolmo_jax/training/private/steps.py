"""Differentially private steps for the training loop: DP-SGD (Abadi et al., 2016) with AdamW.

Each step draws units by Poisson sampling, clips the gradient of each, sums, adds Gaussian noise,
and hands the optimizer the sum over the mean batch size, which is a constant. The ledger knows of
a step before it is taken. A step that a killed run had begun is not taken again: its budget is
spent, and the run has one step less.
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
from flexolmo_jax.training.step import Loss

POINTS = 20  # of the run, at which the spent epsilon is computed; in between, that of the next
SAVES = 20  # at least so often in a run: what is lost when it is killed, is lost for good


@functools.partial(
    jax.jit,
    static_argnames=("loss", "optimizer", "clip", "mechanism", "mesh"),
    donate_argnames=("trainable", "opt_state"),
)
def private_step(
    loss: Loss, optimizer, clip: Clipping, mechanism: Mechanism,
    trainable, opt_state, frozen, batch: Batch, key: jax.Array, *, mesh: Mesh | None = None,
):  # fmt: skip
    """One update of `trainable`, as private as `mechanism` says.

    Args:
      loss, optimizer, clip, mechanism: what is done.
      trainable, opt_state: with a mesh, placed on it.
      frozen: whole on every device.
      batch: of units, [U, W, S]; rows without any weight are padding. With a mesh, its units are
        divided among the devices.
      key: of this step's noise; secret, and never used again.
      mesh: of several devices, or None.

    Returns:
      (trainable, opt_state, metrics). Of the float32 metrics, `grad_norm` is of the private sum;
      `loss`, in nats per token, and `clipped`, the share of units longer than C, are NOT private.
    """

    def local(trainable, frozen, batch):
        is_empty = ~jnp.any(batch.weights > 0, axis=(1, 2))
        summed, about, norms = clipped_gradients(loss, clip, trainable, frozen, batch, is_empty)
        seen = {
            "loss": jnp.sum(about["loss"]),
            "tokens": jnp.sum(batch.weights),
            "clipped": jnp.sum(norms > clip.norm),
            "units": jnp.sum(~is_empty),
        }
        return collectives.psum_batch(summed), collectives.psum_batch(seen)

    specs = specs_of(trainable, mesh)
    everywhere, rows = P(), BATCH
    summed, seen = placement.shard_map(local, mesh, (everywhere, everywhere, rows), everywhere)(
        _moved(trainable, mesh), frozen, batch
    )
    noised = with_noise(summed, mechanism.noise_multiplier, key)
    grads = _moved(jax.tree.map(lambda x: x / mechanism.mean_batch, noised), mesh, specs)
    updates, opt_state = optimizer.update(grads, opt_state, trainable)
    metrics = {
        "loss": seen["loss"] / jnp.maximum(seen["tokens"], 1e-9),
        "clipped": seen["clipped"] / jnp.maximum(seen["units"], 1),
        "grad_norm": optax.tree.norm(grads),
    }
    return optax.apply_updates(trainable, updates), opt_state, metrics


def _moved(tree: Any, mesh: Mesh | None, specs: Any = None) -> Any:
    """Laid out anew: as `specs` says, or whole on every device."""
    if mesh is None:
        return tree
    if specs is None:
        return jax.tree.map(lambda x: jax.reshard(x, P()), tree)
    return jax.tree.map(jax.reshard, tree, specs)


class PrivateSteps:
    """What the loop does in place of `loop.StandardSteps`."""

    whole = True  # each device has all of the frozen weights, and works on units of its own

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
        """`run` is what the ledger plans and knows of; `delta` is the one of its epsilons."""
        self.title, self.privacy = title, privacy
        self.training: Training = config
        self.loss, self.units, self.ledger, self.run = loss, units, ledger, run
        self.mechanism = run.planned
        self.secret = Secret()
        self.mesh = make_mesh() if jax.device_count() > 1 else None
        self.clip = Clipping(privacy.clip, privacy.microbatch_size)
        self.save_every = min(config.checkpoint_every, max(1, config.steps // SAVES))
        shape = (self.mechanism.mean_batch, privacy.windows, config.data.length)
        self.tokens_a_step = int(np.prod(shape))  # at most, in the mean batch
        self._points = np.unique(np.linspace(0, config.steps, POINTS + 1).round().astype(int))
        without_rows = (
            Mechanism(**{**vars(self.mechanism), "steps": int(n), "rows_noise_multiplier": None})
            for n in self._points
        )
        self._spent = [epsilon([one], delta) for one in without_rows]

    def spent(self, step: int) -> float:
        """Epsilon after a step, or a little more."""
        return self._spent[int(np.searchsorted(self._points, step))]

    def start(self, saved: int) -> int:
        """The step to go on after, where `saved` is that of the checkpoint.

        Raises:
          ValueError: all steps were begun, and nothing of them is saved.
        """
        if not saved and self.run.steps == self.training.steps:
            raise ValueError(
                f"{self.title}: all {self.training.steps} steps of this run were begun, and none "
                "was saved; their budget is spent. Train anew, in another run folder"
            )
        return self.run.steps

    def batches(self, start: int) -> Iterator[Batch]:
        """A batch of units for each step that is left."""
        generator = self.secret.generator("training")
        shape = (self.mechanism.largest_batch, self.privacy.windows)
        ways = 1 if self.mesh is None else self.mesh.size
        for drawn in batches(self.mechanism, self.training.steps - start, generator):
            yield self.units.batch(drawn, shape, generator, ways)

    def take(self, step: int, optimizer, trainable, opt_state, frozen, batch: Batch):
        """Takes a step, once the ledger knows of it."""
        on_main_process(lambda: self.ledger.spend(self.run.id, step, self.spent(step)))
        return private_step(
            self.loss, optimizer, self.clip, self.mechanism, trainable, opt_state, frozen, batch,
            self.secret.noise_key(step), mesh=self.mesh,
        )  # fmt: skip

    def breakdown(self, step: int, metrics: dict[str, float], run: Path) -> Diverged | None:
        """Of the private gradient only; to stop for a private loss would say too much."""
        if np.isfinite(metrics["grad_norm"]):
            return None
        return Diverged("the gradient is not finite", "Start anew with a lower learning rate")

    def status(self, step: int) -> str:
        """Shown beside the progress bar."""
        return f"epsilon {self.spent(step):.2f}/{self.privacy.epsilon:g}"
