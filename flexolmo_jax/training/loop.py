"""The one training loop, for all three stages: batches, steps, metrics, checkpoints, resuming."""

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flexolmo_jax import sharding
from flexolmo_jax.config import Training
from flexolmo_jax.data.flexmix import SourceWindows
from flexolmo_jax.data.loader import Batch, batches
from flexolmo_jax.distributed import is_first
from flexolmo_jax.training.checkpoint import Checkpoints
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.step import Loss, train_step
from flexolmo_jax.training.watch import Watch, record_breakdown

RUN_FILE = "config.json"
console = Console(stderr=True)


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""


def describe_run(training: Training, **made_from: Any) -> dict[str, Any]:
    """What a run is, as JSON values: its config, and the digests of what it starts from.

    How it is divided among devices is left out: a run may go on with more or fewer of them.
    """
    values = {**dataclasses.asdict(training), **made_from}
    for name in ("expert_parallel", "tensor_parallel", "parts", "remat", "expert_compute"):
        del values[name]
    return json.loads(json.dumps(values))


def check_run(folder: Path, wanted: dict[str, Any], resume: bool) -> None:
    """Checks that a run may start, or go on, in a folder.

    Raises:
      ValueError: there is a run and `resume` was not asked for, or it is another one.
    """
    file = folder / RUN_FILE
    if not file.exists():
        return
    if not resume:
        raise ValueError(
            f"{folder}: a run is there already; continue it with --resume, or take it away"
        )
    there = json.loads(file.read_text())
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            raise ValueError(
                f"{folder}: cannot resume with another {name}: it was {there.get(name)}, now "
                f"{wanted.get(name)}"
            )


def record_run(folder: Path, wanted: dict[str, Any]) -> None:
    """Writes down what a run is; from then on it has to be resumed, or taken away."""
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{RUN_FILE}.partial"
    partial.write_text(json.dumps(wanted, indent=1))
    partial.replace(folder / RUN_FILE)


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
    """
    title, training = steps.title, steps.training
    mesh = steps.mesh
    # In float32 whatever they are stored in: a step of half precision is rounded off, or overflows.
    trainable = sharding.place(trainable, mesh, dtype="float32")
    frozen = sharding.place(frozen, mesh, () if steps.whole else sharding.AXES)
    optimizer = make_optimizer(training.optimizer, training.steps)
    schedule = make_schedule(training.optimizer, training.steps)
    with sharding.within(mesh):
        opt_state = jax.jit(optimizer.init)(trainable)
    checkpoints = Checkpoints(run / "checkpoints")
    saved, (trainable, opt_state) = checkpoints.load_newest((trainable, opt_state))
    start = steps.start(saved)
    if start:
        console.print(f"{title}: resuming after step {start}")
    metrics_file = run / "metrics.jsonl"
    if is_first():
        _forget_metrics_after(metrics_file, start)
    pending: list[tuple[int, dict[str, jax.Array]]] = []

    with _interruption() as interrupted, _progress(title, training.steps, start) as progress:
        data = steps.batches(start)
        since, since_step = time.monotonic(), start
        for step in range(start + 1, training.steps + 1):
            batch = sharding.place_rows(next(data), mesh)
            with sharding.within(mesh):
                trainable, opt_state, metrics = steps.take(
                    step, optimizer, trainable, opt_state, frozen, batch
                )
            pending.append((step, metrics))
            stopping = interrupted(step)
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
                if is_first():
                    with open(metrics_file, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                progress(step, row["loss"], rate, steps.status(step))
                pending = []
            if saving:
                checkpoints.save(step, (trainable, opt_state))
            if stopping and step < training.steps:
                checkpoints.close()
                raise Interrupted(f"{title}: stopped after step {step}; go on with --resume")
    checkpoints.close()
    if is_first():
        _plot(metrics_file, run / "loss.png", title)
    return trainable if mesh is None else sharding.on_host(trainable)


class Breakdown(NamedTuple):
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

    def breakdown(self, step: int, metrics: dict[str, float], run: Path) -> "Breakdown | None":
        """What went wrong at a step, if anything did."""

    def status(self, step: int) -> str:
        """What more to show beside the progress bar."""


class OrdinarySteps:
    """Steps of `train_step`, on batches that are a function of the seed."""

    whole = False

    def __init__(self, title: str, training: Training, loss: Loss, source: SourceWindows):
        self.title, self.training, self.loss, self.source = title, training, loss, source
        self.mesh = mesh_of(training)
        self.save_every = training.checkpoint_every
        self.tokens_a_step = training.data.batch_size * training.data.length
        self._watch = Watch()

    def start(self, saved: int) -> int:
        return saved

    def batches(self, start: int) -> Iterator[Batch]:
        return batches(self.source, self.training.seed, start)

    def take(self, step: int, optimizer, trainable, opt_state, frozen, batch: Batch):
        return train_step(
            self.loss, optimizer, trainable, opt_state, frozen, batch,
            mesh=self.mesh, parts=self.training.parts,
        )  # fmt: skip

    def breakdown(self, step: int, metrics: dict[str, float], run: Path) -> "Breakdown | None":
        why = self._watch.breakdown(metrics["loss"], metrics["grad_norm"])
        if not why:
            return None
        about = run / "breakdown.json"
        if is_first():
            record_breakdown(about, self.source, self.training.seed, step, why)
        return Breakdown(
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
        mesh = sharding.make_mesh(
            training.expert_parallel, tensor_parallel=training.tensor_parallel
        )
    sharding.check_batch(training, mesh)
    return mesh


@contextlib.contextmanager
def _interruption() -> Iterator[Callable[[int], bool]]:
    """A function that says, after each step, whether to save and stop.

    SIGINT and SIGTERM ask for it. Of several processes, one that is told (preemption of a pod
    sends SIGTERM) tells the others, and all stop after the same step.
    """
    caught: list[int] = []
    old = {}
    together = jax.process_count() > 1  # JAX has taken SIGTERM, to tell the others
    for number in (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: no handlers there
            old[number] = signal.signal(number, lambda n, _: caught.append(n))

    def stop_now(step: int) -> bool:
        if not together:
            return bool(caught)
        if caught:
            caught.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    try:
        yield stop_now
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(
    title: str, steps: int, start: int
) -> Iterator[Callable[[int, float, float, str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[more]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, completed=start, rate="", loss="", more="")

        def update(step: int, loss: float, rate: float, more: str) -> None:
            speed, shown = f"{rate:,.0f} tokens/s", f"loss {loss:.3f}"
            bar.update(task, completed=step, rate=speed, loss=shown, more=more)

        yield update


def _forget_metrics_after(file: Path, step: int) -> None:
    """Drops rows that a killed run wrote after its last checkpoint; they will come again."""
    if not file.exists():
        return
    rows = [line for line in file.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in rows if json.loads(line)["step"] <= step]
    partial = file.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(file)


def _plot(metrics: Path, picture: Path, title: str) -> None:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows])
    axes.set(title=title, xlabel="tokens", ylabel="loss (nats per token)")
    figure.savefig(picture, dpi=120)
