"""The one training loop, for all three stages: batches, steps, metrics, checkpoints, resuming."""

import contextlib
import json
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from matplotlib.figure import Figure

from flexolmo_jax.config import Training
from flexolmo_jax.data.batches import Batch, batches
from flexolmo_jax.data.window_store import SourceWindows
from flexolmo_jax.parallel import placement
from flexolmo_jax.parallel.mesh import AXES, make_mesh
from flexolmo_jax.runtime import startup
from flexolmo_jax.runtime.console import log, progress
from flexolmo_jax.runtime.endings import Interrupted
from flexolmo_jax.runtime.processes import is_main_process
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.training.checkpoint import Checkpoints
from flexolmo_jax.training.divergence import LossMonitor, record_divergence
from flexolmo_jax.training.gradients import check_batch
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.step import Loss, train_step

HIGH_RATE = 0.1  # no AdamW training of a transformer is known to go well above


def train(steps: "Steps", trainable: Any, frozen: Any, run: Path) -> Any:
    """Trains, from the newest checkpoint in `run` if there is one, to the last step.

    Args:
      steps: what happens in each; with the config of the stage.
      trainable: the initial weights, of any dtype; given up to the training (its buffers are
        donated).
      frozen: the weights that stay, in the dtype they have.
      run: folder of checkpoints/, metrics.jsonl and loss.png.

    Returns:
      the trained weights, float32: where they were, or on the host if they were on several
      devices.

    Raises:
      ValueError: the batch cannot be divided among the devices.
      FloatingPointError: the loss broke down (watch.py); the text names the step, breakdown.json
        in `run` the documents, and the last good checkpoint is kept.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
      OSError: the disk is full, or something else kept the state from being written.
    """
    title, training = steps.title, steps.training
    _warn_of_odd_values(training)
    mesh = steps.mesh
    # In float32 whatever they are stored in: a step of half precision is rounded off, or overflows.
    trainable = placement.device_put(trainable, mesh, dtype="float32")
    frozen = placement.device_put(frozen, mesh, () if steps.whole else AXES)
    optimizer = make_optimizer(training.optimizer, training.steps)
    schedule = make_schedule(training.optimizer, training.steps)
    with placement.use_mesh(mesh):
        opt_state = jax.jit(optimizer.init)(trainable)
    checkpoints = Checkpoints(run / "checkpoints")
    saved, (trainable, opt_state) = checkpoints.load_newest((trainable, opt_state))
    start = steps.start(saved)
    if start:
        log(f"{title}: resuming after step {start}")
    metrics_file = run / "metrics.jsonl"
    if is_main_process():
        _forget_metrics_after(metrics_file, start)
    pending: list[tuple[int, dict[str, jax.Array]]] = []

    with (
        _Interruption().watched() as interrupted,
        progress(title, training.steps, start, "step") as bar,
        checkpoints,
    ):
        data = steps.batches(start)
        since, since_step = time.monotonic(), start
        for step in range(start + 1, training.steps + 1):
            batch = placement.put_batch(next(data), mesh)
            with placement.use_mesh(mesh):
                trainable, opt_state, metrics = steps.take(
                    step, optimizer, trainable, opt_state, frozen, batch
                )
            pending.append((step, metrics))
            stopping = interrupted.asks(step)
            saving = step % steps.save_every == 0 or stopping or step == training.steps
            if step % training.log_every == 0 or saving:
                values = [(n, {k: float(v) for k, v in m.items()}) for n, m in pending]
                for number, found in values:
                    if broken := steps.breakdown(number, found, run):
                        checkpoints.close()
                        raise FloatingPointError(
                            f"{title}: {broken.why} at step {number}; the last good checkpoint is "
                            f"{checkpoints.latest()}. {broken.advice}"
                        )
                rate = (step - since_step) * steps.tokens_a_step / (time.monotonic() - since)
                since, since_step = time.monotonic(), step
                row = {
                    "step": step,
                    **{k: sum(m[k] for _, m in values) / len(values) for k in values[0][1]},
                    "learning_rate": float(schedule(step - 1)),
                    "tokens": step * steps.tokens_a_step,
                    "tokens_per_second": round(rate, 1),
                }
                if is_main_process():
                    with open(metrics_file, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                shown = f"loss {row['loss']:.3f}", f"{rate:,.0f} tokens/s"
                bar.update(step, *shown, steps.status(step))
                pending = []
            if saving:
                checkpoints.save(step, (trainable, opt_state))
            if stopping and step < training.steps:
                checkpoints.close()
                raise Interrupted(
                    f"{title}: stopped after step {step}; go on with --resume", interrupted.by_user
                )
    if is_main_process():
        _plot(metrics_file, run / "loss.png", title)
    return trainable if mesh is None else placement.to_host(trainable)


class Diverged(NamedTuple):
    """What stopped a run, and what to do."""

    why: str
    advice: str


class Steps(Protocol):
    """What happens in a step, and around it.

    Attributes:
      title: shown beside the progress bar.
      training: the stage's config: how many steps, the optimizer, the seed.
      mesh: of the devices; None for one.
      whole: frozen weights are whole on every device, not cut among them.
      save_every: steps from one checkpoint to the next.
      tokens_a_step: for the metrics.
    """

    title: str
    training: Training
    mesh: Mesh | None
    whole: bool
    save_every: int
    tokens_a_step: int

    def start(self, saved: int) -> int:
        """The step to go on after, where `saved` is that of the checkpoint; 0 for none."""

    def batches(self, start: int) -> Iterator[Batch]:
        """The batch of every step after `start`."""

    def take(self, step: int, optimizer, trainable, opt_state, frozen, batch: Batch) -> tuple:
        """(trainable, opt_state, metrics) after a step; the metrics hold loss and grad_norm."""

    def breakdown(self, step: int, metrics: dict[str, float], run: Path) -> "Diverged | None":
        """What went wrong at a step, if anything did."""

    def status(self, step: int) -> str:
        """What more to show beside the progress bar."""


class StandardSteps:
    """Steps of `train_step`, on batches that are a function of the seed."""

    whole = False

    def __init__(self, title: str, training: Training, loss: Loss, source: SourceWindows):
        self.title, self.training, self.loss, self.source = title, training, loss, source
        self.mesh = mesh_of(training)
        self.save_every = training.checkpoint_every
        self.tokens_a_step = training.data.batch_size * training.data.length
        self._watch = LossMonitor()

    def start(self, saved: int) -> int:
        return saved

    def batches(self, start: int) -> Iterator[Batch]:
        return batches(self.source, self.training.seed, start)

    def take(self, step: int, optimizer, trainable, opt_state, frozen, batch: Batch):
        return train_step(
            self.loss, optimizer, trainable, opt_state, frozen, batch,
            mesh=self.mesh, microbatches=self.training.microbatches,
        )  # fmt: skip

    def breakdown(self, step: int, metrics: dict[str, float], run: Path) -> "Diverged | None":
        why = self._watch.breakdown(metrics["loss"], metrics["grad_norm"])
        if not why:
            return None
        about = run / "breakdown.json"
        if is_main_process():
            record_divergence(about, self.source, self.training.seed, step, why)
        return Diverged(
            why,
            f"{about} names the documents of that step: look at them, or start anew with a lower "
            "learning rate",
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


class _Interruption:
    """Says, after each step, whether to save and stop: SIGINT and SIGTERM ask for it.

    Of several processes, one that is told (preemption of a pod sends SIGTERM) tells the others,
    and all stop after the same step.
    """

    def __init__(self) -> None:
        self.by_user = False
        self._caught = False
        self._together = jax.process_count() > 1  # JAX has taken SIGTERM, to tell the others

    def asks(self, step: int) -> bool:
        """Whether to stop after this step."""
        if not self._together:
            return self._caught
        if self._caught:
            self._caught = False
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def watched(self) -> Iterator["_Interruption"]:
        """Signals are caught while the body runs."""
        old = {}
        for number in (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: no handlers there
                old[number] = signal.signal(number, self._catch)
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _catch(self, number: int, _: Any) -> None:
        self._caught = True
        if number == signal.SIGINT:
            self.by_user = True
            signal.signal(signal.SIGINT, startup.second_interrupt)
            # os.write: a handler may run while the console holds its lock.
            os.write(2, b"flexolmo: saving after this step; Ctrl-C again ends at once\n")


def _warn_of_odd_values(training: Training) -> None:
    """Of values that can be meant, and mostly are not."""
    optimizer = training.optimizer
    if optimizer.warmup_steps > training.steps:
        warnings.warn(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is more than steps={training.steps}: "
            "the learning rate is never reached",
            stacklevel=3,
        )
    if optimizer.learning_rate > HIGH_RATE:
        warnings.warn(
            f"optimizer.learning_rate={optimizer.learning_rate:g} is above {HIGH_RATE:g}: training "
            "is likely to break down",
            stacklevel=3,
        )


def _forget_metrics_after(file: Path, step: int) -> None:
    """Drops rows that a killed run wrote after its last checkpoint; they will come again."""
    if not file.exists():
        return
    rows = [line for line in file.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in rows if json.loads(line)["step"] <= step]
    replace_file(file, "".join(line + "\n" for line in kept))


def _plot(metrics: Path, picture: Path, title: str) -> None:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows])
    axes.set(title=title, xlabel="tokens", ylabel="loss (nats per token)")
    figure.savefig(picture, dpi=120)
