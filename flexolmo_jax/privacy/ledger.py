"""The owner's ledger, budget.json: what every private run on a body of text may spend, and has.

Spending is written down before it happens, and the file is replaced in one rename, so that a
process that dies at any moment can have spent less than is written, never more. Reading takes no
lock: a rename shows either the old file or the new one.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexolmo_jax.privacy.accounting import Mechanism, epsilon
from flexolmo_jax.privacy.text_marks import read_marks, write_marks
from flexolmo_jax.storage.files import replace_file

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
        # Not a link to it: one rename would put a second ledger in the link's place.
        self.file = Path(os.path.realpath(file))

    def check_text(self, source: str, text: str) -> None:
        """Before a run starts or goes on: is this the only ledger of its text? Changes nothing.

        Args:
          source: where the text is.
          text: its fingerprint (`text_marks.digest_of_documents`).

        Raises:
          ValueError: the text has another ledger; this one is a copy of another, or is missing
            beside its lock. What was spent would not be counted.
        """
        self._check_place()
        marks = read_marks(source, text)
        known = self._read()
        for mark in marks:
            if mark.id == known.get("id"):
                continue  # the same ledger; whether it is a copy was checked above
            if mark.ledger.exists():
                raise ValueError(
                    f"{source}: this text has another ledger, {mark.ledger} (says {mark.file}); "
                    f"earlier runs would not be counted in {self.file}: name that one with "
                    "--dp-ledger"
                )
            if mark.ledger.parent.exists():
                raise ValueError(
                    f"{source}: the ledger of this text, {mark.ledger}, is missing (says "
                    f"{mark.file}), so what earlier runs have spent is not known: bring it back, "
                    "or name it with --dp-ledger. If it is lost for good, the text should not be "
                    "trained on again; deleting that mark gives up the guarantee of all runs "
                    "together"
                )
            _tell(
                f"{source}: an earlier ledger of this text, {mark.ledger}, is gone with its "
                f"folder; its runs are not counted here"
            )

    def mark_text(self, source: str, text: str) -> None:
        """Writes down that this is the ledger of a text: in it, beside the text, and in the user's
        state directory. Says where that was not possible."""
        with self._open() as ledger:
            ledger_id = ledger.setdefault("id", uuid.uuid4().hex)
            ledger["file"] = str(self.file)
            before = ledger.get("texts", [])
            ledger["texts"] = sorted({*before, text})
            new = not before and len(ledger["runs"]) == 1
        if new:
            _tell(
                f"{self.file}: a new ledger, which knows of no earlier run. If there was any on "
                "this text, name its ledger with --dp-ledger"
            )
        elif text not in before:
            _tell(
                f"{self.file}: knows of no earlier run on this text as it is now; its runs, on "
                "whatever text, are all counted together"
            )
        for file in write_marks(source, text, self.file, ledger_id):
            _tell(
                f"{file}: cannot be written, so no mark of the ledger is there; a second ledger "
                "for this text may go unnoticed"
            )

    def _check_place(self) -> None:
        """Raises ValueError if this file is a copy, or is gone while its lock is still there."""
        if self.file.exists():
            before = self._read().get("file")
            if before is None or before == str(self.file) or not os.path.exists(before):
                return
            if os.path.samefile(before, self.file):
                return
            with contextlib.suppress(ValueError):
                if Ledger(Path(before))._read().get("id") != self._read()["id"]:
                    return
            raise ValueError(
                f"{self.file}: a copy of another ledger, {before}, which is still there; what is "
                "spent in one is not counted in the other: name that one with --dp-ledger, and go "
                "on in the run's first folder"
            )
        old = self.file.with_suffix(".lock")  # of earlier versions
        for lock in (self._lock, old):
            if lock.is_file() and not lock.stat().st_size and not _is_held(lock):
                raise ValueError(
                    f"{self.file}: missing, while its lock {lock} is still there, so what earlier "
                    "runs have spent is not known: bring the ledger back; if there never was a "
                    "run, delete the lock"
                )

    @property
    def _lock(self) -> Path:
        return self.file.with_name(f".{self.file.name}.lock")

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
          ValueError: with the run, the limit would be exceeded, or delta or unit is another one;
            nothing is entered.
        """
        with self._open() as ledger:
            others = sorted({one["unit"] for one in ledger["runs"]} - {unit})
            if others:
                raise ValueError(
                    f"{self.file}: its runs protect the unit {', '.join(others)}, and this one "
                    f"{unit}; epsilons of different units cannot be added: use the same --dp-unit"
                )
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
        return self._find(_runs(self._read()), run_id)

    def contents(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return self._read()

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
        self._read()  # what is no ledger gets no lock beside it
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            try:
                before = self._read()
                ledger = json.loads(json.dumps(before))
                yield ledger
                if ledger != before:
                    _write(self.file, ledger)
            finally:
                if not self.file.exists():  # a lock alone would look like a ledger that was lost
                    self._lock.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        while True:
            with open(self._lock, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._lock.exists() and os.path.samestat(
                    os.fstat(lock.fileno()), os.stat(self._lock)
                ):
                    yield
                    return
            # Another process has deleted the lock while this one waited for it.

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {"format": FORMAT, "runs": []}
        try:
            text = self.file.read_text(encoding="utf-8")
            ledger = json.loads(text, parse_constant=_no_constant)
            if ledger.get("format") == FORMAT:
                _check(ledger)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.file}: damaged, not a ledger ({error}); what was spent is not known, so "
                "no run starts: bring back a copy of it"
            ) from error
        if ledger.get("format") != FORMAT:
            raise ValueError(
                f"{self.file}: expected format {FORMAT}, found {ledger.get('format')!r}; another "
                "version of flexolmo_jax wrote it"
            )
        return ledger


def _check(ledger: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError if a value of a ledger is not of its type."""
    for run in _runs(ledger):
        texts = (run.id, run.name, run.folder, run.unit, run.started)
        flags = (run.rows, run.finished)
        if not all(isinstance(x, str) for x in texts) or not all(type(x) is bool for x in flags):
            raise ValueError(f"a run of other types: {run.id!r}")
        if type(run.steps) is not int or not 0 <= run.steps <= run.planned.steps:
            raise ValueError(f"run {run.id!r} has begun {run.steps!r} steps")
        for number in (run.planned_epsilon, run.spent_epsilon):
            _number(number, "epsilon")
    for name in ("delta", "epsilon_limit", "epsilon_spent"):
        if name in ledger:
            _number(ledger[name], name)
    if not 0 < ledger.get("delta", 0.5) < 1:
        raise ValueError(f"delta is {ledger['delta']}")
    if bool(ledger["runs"]) != ("delta" in ledger and "epsilon_limit" in ledger):
        raise ValueError("runs without a delta and a limit, or these without runs")
    texts = ledger.get("texts", [])
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise ValueError("texts that are no fingerprints")
    for name in ("id", "file"):
        if not isinstance(ledger.get(name, ""), str):
            raise ValueError(f"{name} is {ledger[name]!r}")


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock, as one that enters its first run in a new ledger does."""
    with contextlib.suppress(FileNotFoundError), open(lock, "rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
    return True  # and has deleted it by now


def _number(value: Any, name: str) -> None:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}")


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _tell(text: str) -> None:
    """On standard error: standard output may be JSON."""
    print(text, file=sys.stderr)


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
