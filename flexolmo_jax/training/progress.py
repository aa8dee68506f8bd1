"""How far a run is, on standard error."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MAX_SECONDS_BETWEEN_LINES = 30.0
console = Console(stderr=True)


@contextlib.contextmanager
def progress(
    title: str, steps: int, start: int
) -> Iterator[Callable[[int, float, float, str], None]]:
    """Shows a bar on a terminal, and lines in a log (nohup, Slurm).

    Args:
      title: of the run.
      steps: of the whole run.
      start: steps that are done.

    Yields:
      update(step, loss, rate, status): rate in tokens per second; status is shown as it is.
    """
    if not (console.is_interactive or console.is_jupyter):
        yield _lines(title, steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, completed=start, rate="", loss="", status="")

        def update(step: int, loss: float, rate: float, status: str) -> None:
            speed, shown = f"{rate:,.0f} tokens/s", f"loss {loss:.3f}"
            bar.update(task, completed=step, rate=speed, loss=shown, status=status)

        yield update


def _lines(title: str, steps: int) -> Callable[[int, float, float, str], None]:
    """Plain lines: often at first, so that a log soon shows that all is well; then rarely."""
    started = last = time.monotonic()
    first: tuple[int, float] | None = None  # the first step takes longer: it is compiled

    def update(step: int, loss: float, rate: float, status: str) -> None:
        nonlocal first, last
        now = time.monotonic()
        if console.quiet or (
            first
            and step < steps
            and now - last < min(MAX_SECONDS_BETWEEN_LINES, (now - started) / 20)
        ):
            return
        last = now
        left = ""
        if first is None:
            first = (step, now)
        else:
            seconds = (now - first[1]) / (step - first[0]) * (steps - step)
            left = f"{_duration(seconds)} left"
        speed = f"{rate:,.0f} tokens/s"
        words = (f"{title}: step {step}/{steps}", f"loss {loss:.3f}", speed, left, status)
        print(", ".join(filter(None, words)), file=sys.stderr, flush=True)

    return update


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
