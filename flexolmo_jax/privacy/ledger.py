"""The owner's ledger, budget.json: what every private run on a body of text may spend, and has.

Spending is written down before it happens, and the file is replaced in one rename, so that a
process that dies at any moment can have spent less than is written, never more.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexolmo_jax.federation.package import replace_file
from flexolmo_jax.privacy.accounting import Mechanism, epsilon

FILE = "budget.json"
FORMAT = 1
MARK = "private_run.json"  # in a run's folder: which run of the ledger it is


@dataclasses.dataclass
class Run:
    """One run in the ledger.

    Attributes:
      id: also in the run's folder, so that it can go on; random.
      name: of the expert.
      folder: of the run. Once its mark is gone the run cannot go on, and only what it has spent
        counts; until then all that was planned does.
      unit: of privacy.
      planned: all that the run may do.
      planned_epsilon: of that, at the ledger's delta.
      steps: that were begun.
      rows: whether the release for the router rows was begun.
      spent_epsilon: of what was begun, at the ledger's delta; an upper bound.
      finished: whether the package is written.
      started: when, UTC.
    """

    id: str
    name: str
    folder: str
    unit: str
    planned: Mechanism
    planned_epsilon: float
    steps: int = 0
    rows: bool = False
    spent_epsilon: float = 0.0
    finished: bool = False
    started: str = ""

    @property
    def spent(self) -> Mechanism:
        rows = self.planned.rows_noise_multiplier if self.rows else None
        return dataclasses.replace(self.planned, steps=self.steps, rows_noise_multiplier=rows)

    @property
    def counted(self) -> Mechanism:
        """What may come of the run: what was spent, or all that was planned if it may go on."""
        can_go_on = not self.finished and marked_run(Path(self.folder)) == self.id
        return self.planned if can_go_on else self.spent


class Ledger:
    """The ledger in a file. Runs of several processes at a time take turns in it."""

    def __init__(self, file: Path):
        self.file = file.absolute()

    def admit(
        self,
        name: str,
        folder: Path,
        unit: str,
        planned: Mechanism,
        delta: float,
        limit: float | None,
        default_limit: float,
    ) -> str:
        """Enters a run that is about to start, if the owner's limit allows for all of it.

        Args:
          name, folder, unit, planned: as in `Run`.
          delta: of the ledger, the same for all of its runs.
          limit: of all runs together, from now on; None leaves it as it is.
          default_limit: of a ledger that has none yet.

        Returns:
          the run's id, which is in its folder too.

        Raises:
          ValueError: with the run, the limit would be exceeded, or delta is another one; nothing
            is entered.
        """
        with self._open() as ledger:
            if ledger.setdefault("delta", delta) != delta:
                raise ValueError(
                    f"{self.file}: this ledger accounts at delta {ledger['delta']:g}, found "
                    f"{delta:g}; give that as --dp-delta, or name another --dp-ledger"
                )
            if limit is None:
                limit = ledger.get("epsilon_limit", default_limit)
            runs = _runs(ledger)
            before = [run.counted for run in runs]
            total = epsilon([*before, planned], ledger["delta"])
            if total > limit:
                spent = epsilon(before, ledger["delta"]) if before else 0.0
                raise ValueError(
                    f"{self.file}: this run would bring epsilon to {total:.3f} (at delta "
                    f"{ledger['delta']:.2g}), above the owner's limit of {limit:g}; {len(runs)} "
                    f"earlier runs have taken {spent:.3f}. Ask for less with --dp-epsilon, or "
                    "raise the limit with --dp-limit if you mean to"
                )
            ledger["epsilon_limit"] = limit
            run = Run(
                uuid.uuid4().hex, name, str(folder.absolute()), unit, planned,
                planned_epsilon=epsilon([planned], ledger["delta"]),
                started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            )  # fmt: skip
            _put(ledger, [*runs, run])
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / MARK, {"run": run.id, "ledger": str(self.file)})
        return run.id

    def resume(self, run_id: str, folder: Path, limit: float | None) -> Run:
        """A run that is about to go on, as it is written down; `limit` is as in `admit`.

        Raises:
          ValueError: it is not in this ledger; or others have taken what it would still need.
        """
        with self._open() as ledger:
            runs = _runs(ledger)
            run = self._find(runs, run_id)
            others = [one.counted for one in runs if one is not run]
            total = epsilon([*others, run.planned], ledger["delta"])
            if limit is not None:
                ledger["epsilon_limit"] = limit
            if total > ledger["epsilon_limit"]:
                raise ValueError(
                    f"{self.file}: going on would bring epsilon to {total:.3f}, above the owner's "
                    f"limit of {ledger['epsilon_limit']:g}: other runs were started since"
                )
            run.folder = str(folder.absolute())
            _put(ledger, runs)
        return run

    def spend(self, run_id: str, step: int, spent_epsilon: float) -> None:
        """Writes down that a run begins a step, before it does.

        Args:
          run_id: the run.
          step: its number, from 1.
          spent_epsilon: of the run, up to and with this step.

        Raises:
          ValueError: it is not the next step: another process goes on with the same run.
        """
        with self._open() as ledger:
            runs = _runs(ledger)
            run = self._find(runs, run_id)
            if step != run.steps + 1 or step > run.planned.steps:
                raise ValueError(
                    f"{self.file}: run {run_id} has begun {run.steps} of {run.planned.steps} "
                    f"steps, so step {step} is not its next one; does another process go on "
                    "with the same run?"
                )
            run.steps, run.spent_epsilon = step, spent_epsilon
            _put(ledger, runs)

    def spend_rows(self, run_id: str) -> None:
        """Writes down that a run is about to make its release for the router rows.

        Raises:
          ValueError: it was made before, or was not planned.
        """
        with self._open() as ledger:
            runs = _runs(ledger)
            run = self._find(runs, run_id)
            if run.rows or run.planned.rows_noise_multiplier is None:
                raise ValueError(
                    f"{self.file}: run {run_id} has spent what was planned for router rows, and "
                    "its release is lost; train anew, in another run folder"
                )
            run.rows = True
            run.spent_epsilon = epsilon([run.spent], ledger["delta"])
            _put(ledger, runs)

    def finish(self, run_id: str) -> list[Run]:
        """Closes a run; returns all runs, this one last."""
        with self._open() as ledger:
            runs = _runs(ledger)
            run = self._find(runs, run_id)
            run.finished = True
            run.spent_epsilon = epsilon([run.spent], ledger["delta"])
            ledger["epsilon_spent"] = epsilon([one.counted for one in runs], ledger["delta"])
            _put(ledger, runs)
        return [one for one in runs if one is not run] + [run]

    def delta(self) -> float | None:
        """The one that all runs are accounted at; None before the first."""
        return self.contents().get("delta")

    def run(self, run_id: str) -> Run:
        """A run as it is written down. Raises ValueError if it is not."""
        with self._open() as ledger:
            return self._find(_runs(ledger), run_id)

    def contents(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        with self._open() as ledger:
            return json.loads(json.dumps(ledger))

    def _find(self, runs: list[Run], run_id: str) -> Run:
        found = [run for run in runs if run.id == run_id]
        if not found:
            raise ValueError(
                f"{self.file}: run {run_id} is not in this ledger, so what it has spent is not "
                "known; name the ledger it was entered in with --dp-ledger"
            )
        return found[0]

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """The contents, for this process alone; changes are written on leaving."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._read()
            ledger = json.loads(json.dumps(before))
            yield ledger
            if ledger != before:
                _write(self.file, ledger)

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {"format": FORMAT, "runs": []}
        try:
            ledger = json.loads(self.file.read_text())
            _runs(ledger)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.file}: damaged, not a ledger ({error}); what was spent is not known, so "
                "no run starts: bring back a copy of it"
            ) from error
        if ledger.get("format") != FORMAT:
            raise ValueError(
                f"{self.file}: expected format {FORMAT}, found {ledger.get('format')}; another "
                "version of flexolmo_jax wrote it"
            )
        return ledger


def marked_run(folder: Path) -> str | None:
    """The id of the private run in a folder, if there is one."""
    file = folder / MARK
    return json.loads(file.read_text())["run"] if file.exists() else None


def _runs(ledger: dict[str, Any]) -> list[Run]:
    return [Run(**{**entry, "planned": Mechanism(**entry["planned"])}) for entry in ledger["runs"]]


def _put(ledger: dict[str, Any], runs: list[Run]) -> None:
    ledger["runs"] = [dataclasses.asdict(run) for run in runs]


def _write(file: Path, value: dict[str, Any]) -> None:
    replace_file(file, json.dumps(value, indent=1) + "\n")
