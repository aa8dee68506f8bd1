"""The training loop of all stages: batches, steps, metrics, checkpoints, resuming."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from flexolmo_jax.config import Training
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.data.order import batches
from flexolmo_jax.data.window_store import SourceWindows
from flexolmo_jax.parallel import placement
from flexolmo_jax.parallel.mesh import AXES, make_mesh
from flexolmo_jax.runtime.console import log, progress
from flexolmo_jax.runtime.endings import Interrupted
from flexolmo_jax.runtime.processes import is_main_process
from flexolmo_jax.training.checkpoint import Checkpoints
from flexolmo_jax.training.divergence import LossMonitor, record_divergence
from flexolmo_jax.training.gradients import check_batch
from flexolmo_jax.training.interruption import Interruption
from flexolmo_jax.training.metrics import Metrics
from flexolmo_jax.training.objectives import Loss
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.step import train_step

HIGH_LEARNING_RATE = 0.1  # AdamW training of a transformer hardly ever works above


def train(runner: "StepRunner", trainable: Any, frozen: Any, run: Path) -> Any:
    """Trains from the newest checkpoint in `run`, if there is one, to the last step.

    Args:
      runner: runs each step; has the stage's config.
      trainable: the initial weights, of any dtype; their buffers are donated.
      frozen: the frozen weights; their dtype is kept.
      run: folder of checkpoints/, metrics.jsonl and loss.png.

    Returns:
      the trained weights, float32: where they were, or on the host if they were on several
      devices.

    Raises:
      ValueError: the batch cannot be divided among the devices.
      FloatingPointError: the run diverged; the message names the step, divergence.json in `run`
        the documents of its batch. The last good checkpoint is kept.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
      OSError: the disk is full, or the state cannot be written for another reason.
    """
    title, training, mesh = runner.title, runner.training, runner.mesh
    _warn_of_unusual_values(training)
    # Always float32: an update in half precision would be rounded away, or overflow.
    trainable = placement.device_put(trainable, mesh, dtype="float32")
    frozen = placement.device_put(frozen, mesh, () if runner.replicates_frozen else AXES)
    optimizer = make_optimizer(training.optimizer, training.steps)
    with placement.use_mesh(mesh):
        opt_state = jax.jit(optimizer.init)(trainable)
    checkpoints = Checkpoints(run / "checkpoints")
    saved, (trainable, opt_state) = checkpoints.load_newest((trainable, opt_state))
    start = runner.start(saved)
    if start:
        log(f"{title}: resuming after step {start}")
    schedule = make_schedule(training.optimizer, training.steps)
    metrics = Metrics(run, title, schedule, runner.tokens_per_step)

    with (
        Interruption().watched() as interruption,
        progress(title, training.steps, start, "step") as bar,
        checkpoints,
    ):
        data = runner.batches(start)
        metrics.start(start)
        for step in range(start + 1, training.steps + 1):
            batch = placement.put_batch(next(data), mesh)
            with placement.use_mesh(mesh):
                trainable, opt_state, values = runner.take(
                    step, optimizer, trainable, opt_state, frozen, batch
                )
            metrics.add(step, values)
            stopping = interruption.requested(step)
            saving = step % runner.save_every == 0 or stopping or step == training.steps
            if step % training.log_every == 0 or saving:
                pending = metrics.pending()
                _check_divergence(runner, pending, run, checkpoints)  # before they are written
                row = metrics.write(pending)
                shown = f"loss {row['loss']:.3f}", f"{row['tokens_per_second']:,.0f} tokens/s"
                bar.update(step, *shown, runner.status(step))
            if saving:
                checkpoints.save(step, (trainable, opt_state))
            if stopping and step < training.steps:
                checkpoints.close()
                raise Interrupted(
                    f"{title}: stopped after step {step}; continue with --resume",
                    interruption.by_user,
                )
    metrics.plot()
    return trainable if mesh is None else placement.to_host(trainable)


def _check_divergence(
    runner: "StepRunner",
    values: list[tuple[int, dict[str, float]]],
    run: Path,
    checkpoints: Checkpoints,
) -> None:
    for step, found in values:
        if diverged := runner.divergence(step, found, run):
            checkpoints.close()
            raise FloatingPointError(
                f"{runner.title}: {diverged.why} at step {step}; the last good checkpoint is "
                f"{checkpoints.latest()}. {diverged.advice}"
            )


class Diverged(NamedTuple):
    """Why a run has to stop, and what the user can do."""

    why: str
    advice: str


class StepRunner(Protocol):
    """What the loop runs: one training step, and what belongs to it.

    Attributes:
      title: shown beside the progress bar.
      training: the stage's config.
      mesh: of several devices, or None for one device.
      replicates_frozen: whether frozen weights are replicated, not sharded.
      save_every: steps between checkpoints.
      tokens_per_step: for the metrics.
    """

    title: str
    training: Training
    mesh: Mesh | None
    replicates_frozen: bool
    save_every: int
    tokens_per_step: int

    def start(self, saved: int) -> int:
        """The step to resume after, given the step of the checkpoint; 0 for none."""

    def batches(self, start: int) -> Iterator[Batch]:
        """The batch of every step after `start`."""

    def take(self, step: int, optimizer, trainable, opt_state, frozen, batch: Batch) -> tuple:
        """(trainable, opt_state, metrics) after a step; metrics include loss and grad_norm."""

    def divergence(self, step: int, metrics: dict[str, float], run: Path) -> Diverged | None:
        """Why the run has to stop after a step, or None."""

    def status(self, step: int) -> str:
        """More text to show beside the progress bar."""


class StandardSteps:
    """Runs `train_step` on batches that depend on the seed and the step alone."""

    replicates_frozen = False

    def __init__(self, title: str, training: Training, loss: Loss, source: SourceWindows):
        self.title, self.training, self.loss, self.source = title, training, loss, source
        self.mesh = mesh_of(training)
        self.save_every = training.checkpoint_every
        self.tokens_per_step = training.data.batch_size * training.data.length
        self._monitor = LossMonitor()

    def start(self, saved: int) -> int:
        return saved

    def batches(self, start: int) -> Iterator[Batch]:
        return batches(self.source, self.training.seed, start)

    def take(self, step: int, optimizer, trainable, opt_state, frozen, batch: Batch):
        return train_step(
            self.loss, optimizer, trainable, opt_state, frozen, batch,
            mesh=self.mesh, microbatches=self.training.microbatches,
        )  # fmt: skip

    def divergence(self, step: int, metrics: dict[str, float], run: Path) -> Diverged | None:
        why = self._monitor.divergence(metrics["loss"], metrics["grad_norm"])
        if not why:
            return None
        file = run / "divergence.json"
        if is_main_process():
            record_divergence(file, self.source, self.training.seed, step, why)
        return Diverged(
            why,
            f"{file} names the documents of that step: look at them, or start a new run with a "
            "lower learning rate",
        )

    def status(self, step: int) -> str:
        return ""


def mesh_of(training: Training) -> Mesh | None:
    """The mesh of all devices, or None where there is one.

    Raises:
      ValueError: the batch cannot be divided among them.
    """
    mesh = None
    if max(jax.device_count(), training.expert_parallel, training.tensor_parallel) > 1:
        mesh = make_mesh(training.expert_parallel, tensor_parallel=training.tensor_parallel)
    check_batch(training, mesh)
    return mesh


def _warn_of_unusual_values(training: Training) -> None:
    """Warns of values that are allowed, but are mostly mistakes."""
    optimizer = training.optimizer
    if optimizer.warmup_steps > training.steps:
        warnings.warn(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is more than steps={training.steps}: "
            "the learning rate is never reached",
            stacklevel=3,
        )
    if optimizer.learning_rate > HIGH_LEARNING_RATE:
        warnings.warn(
            f"optimizer.learning_rate={optimizer.learning_rate:g} is above {HIGH_LEARNING_RATE:g}: "
            "training is likely to diverge",
            stacklevel=3,
        )
