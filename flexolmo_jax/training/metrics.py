"""The metrics of a run: metrics.jsonl, one row per logged step, and loss.png."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import optax
from matplotlib.figure import Figure

from flexolmo_jax.runtime.processes import is_main_process
from flexolmo_jax.storage.files import replace_file


class Metrics:
    """Collects what steps return, without waiting for the devices, and writes rows of means.

    Only the main process writes.
    """

    def __init__(self, run: Path, title: str, schedule: optax.Schedule, tokens_per_step: int):
        self._file, self._plot, self._title = run / "metrics.jsonl", run / "loss.png", title
        # Compiled as one program, not operation by operation.
        self._schedule, self._tokens_per_step = jax.jit(schedule), tokens_per_step
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []

    def start(self, step: int) -> None:
        """Drops the rows after `step`, which a killed run wrote, and starts the clock."""
        if is_main_process() and self._file.exists():
            rows = [line for line in self._file.read_text().splitlines() if line.endswith("}")]
            valid = [row for row in rows if json.loads(row)["step"] <= step]
            replace_file(self._file, "".join(row + "\n" for row in valid))
        self._last_step, self._last_time = step, time.monotonic()

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step."""
        self._pending.append((step, values))

    def pending(self) -> list[tuple[int, dict[str, float]]]:
        """The metrics of each step since the last row; waits for the devices."""
        return [(step, {k: float(v) for k, v in m.items()}) for step, m in self._pending]

    def write(self, values: list[tuple[int, dict[str, float]]]) -> dict[str, Any]:
        """Appends and returns the row of `values`, which are those of `pending`."""
        step, now = values[-1][0], time.monotonic()
        tokens = (step - self._last_step) * self._tokens_per_step
        row = {
            "step": step,
            **{k: sum(m[k] for _, m in values) / len(values) for k in values[0][1]},
            "learning_rate": float(self._schedule(step - 1)),
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": round(tokens / (now - self._last_time), 1),
        }
        self._pending, self._last_step, self._last_time = [], step, now
        if is_main_process():
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def plot(self) -> None:
        """Draws the loss over the tokens of the whole run."""
        if not is_main_process():
            return
        rows = [json.loads(line) for line in self._file.read_text().splitlines()]
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows])
        axes.set(title=self._title, xlabel="tokens", ylabel="loss (nats per token)")
        figure.savefig(self._plot, dpi=120)
