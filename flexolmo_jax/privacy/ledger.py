"""The owner's ledger, budget.json: what each private run on a text may spend, and has spent.

Spending is recorded before it happens, and the file is replaced by one rename, so a process that
dies at any moment has spent at most what is recorded. Reading takes no lock: a rename shows either
the old file or the new one.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from flexolmo_jax.privacy.accounting import Mechanism, epsilon
from flexolmo_jax.privacy.ledger_fields import check_ledger
from flexolmo_jax.privacy.text_marks import read_marks, write_marks
from flexolmo_jax.storage.files import replace_file

FILE = "budget.json"
FORMAT = 1
MARK = "private_run.json"  # in a run's folder: the id of its entry in the ledger
WRITTEN = (
    "The ledger beside this file was written.\n"  # in its lock; without it, there was none yet
)


@dataclasses.dataclass
class Run:
    """One run in the ledger.

    Attributes:
      id: random; also in the run's folder, so that the run can be resumed.
      name: of the expert.
      folder: of the run. While it holds the run's mark, the run can be resumed and counts as
        planned; afterwards only what it has spent counts.
      unit: of privacy.
      planned: all that the run may do.
      planned_epsilon: epsilon of `planned`, at the ledger's delta.
      steps: number of steps begun.
      rows: whether the release for the router rows was begun.
      spent_epsilon: an upper bound of the epsilon of what was begun, at the ledger's delta.
      finished: whether the package is written.
      started: UTC, in ISO format.
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
        """What the run counts for: its plan while it can be resumed, else what it has spent."""
        resumable = not self.finished and marked_run(Path(self.folder)) == self.id
        return self.planned if resumable else self.spent


class Ledger:
    """The ledger in a file; concurrent processes write to it one at a time."""

    def __init__(self, file: Path):
        # Resolves links: a rename onto a link would replace the link, and make a second ledger.
        self.file = Path(os.path.realpath(file))

    def check_text(self, source: str, text: str) -> None:
        """Checks that this is the only ledger of a text, before a run starts or resumes.

        Args:
          source: path of the text.
          text: its fingerprint (`text_marks.digest_of_documents`).

        Raises:
          ValueError: the text has another ledger, or this ledger is a copy of another or is
            missing beside its lock. Earlier spending would not be counted.
        """
        self._check_place()
        marks = read_marks(source, text)
        known = self._read()
        for mark in marks:
            if mark.id == known.get("id"):
                continue  # this ledger; `_check_place` has excluded copies
            if mark.ledger.exists():
                raise ValueError(
                    f"{source}: this text has another ledger, {mark.ledger} (recorded in "
                    f"{mark.file}); earlier runs would not be counted in {self.file}: name that "
                    "one with --dp-ledger"
                )
            if mark.ledger.parent.exists():
                raise ValueError(
                    f"{source}: the ledger of this text, {mark.ledger}, is missing "
                    f"(recorded in {mark.file}), so what earlier runs have spent is not known: "
                    "restore it, or name it with --dp-ledger. If it is lost for good, the text "
                    "should not be trained on again; deleting the mark gives up the guarantee for "
                    "all runs together"
                )
            _warn(
                f"{source}: an earlier ledger of this text, {mark.ledger}, no longer exists, nor "
                f"does its folder; its runs are not counted here"
            )

    def mark_text(self, source: str, text: str) -> None:
        """Records that this is the ledger of a text: in it, beside the text, and in the user's
        state directory. Prints a warning for each place that cannot be written.

        Args:
          source, text: as in `check_text`.
        """
        with self._open() as ledger:
            ledger_id = ledger.setdefault("id", uuid.uuid4().hex)
            ledger["file"] = str(self.file)
            before = ledger.get("texts", [])
            ledger["texts"] = sorted({*before, text})
            new = not before and len(ledger["runs"]) == 1
        if new:
            _warn(
                f"{self.file}: a new ledger, which knows of no earlier run. If there was one on "
                "this text, name its ledger with --dp-ledger"
            )
        elif text not in before:
            _warn(
                f"{self.file}: knows of no earlier run on this text as it is now; all of its "
                "runs are counted together, whatever their text"
            )
        for file in write_marks(source, text, self.file, ledger_id):
            _warn(
                f"{file}: cannot be written, so it holds no mark of the ledger; a second ledger "
                "for this text may go unnoticed"
            )

    def _check_place(self) -> None:
        """Raises ValueError if this file is a copy, or is missing beside a lock of a ledger."""
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
                f"{self.file}: a copy of another ledger, {before}, which still exists; what one "
                "records is not counted in the other: name the original with --dp-ledger, and "
                "resume in the run's first folder"
            )
        # A lock without WRITTEN proves nothing: a process holds it that has not written the ledger
        # yet, or one was killed before it could. Earlier versions left another, always empty lock.
        old = self.file.with_suffix(".lock")
        is_old = old.is_file() and not old.stat().st_size and not _is_held(old)
        for lock, shows_a_ledger in ((self._lock, _is_marked(self._lock)), (old, is_old)):
            if shows_a_ledger:
                raise ValueError(
                    f"{self.file}: missing, while its lock {lock} still exists, so what earlier "
                    "runs have spent is not known: restore the ledger; if there never was a run, "
                    "delete the lock"
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
        """Enters a run that is about to start, if the owner's limit covers all of it.

        Args:
          name, folder, unit, planned: as in `Run`.
          delta: of the ledger; all of its runs must use the same.
          limit: epsilon of all runs together, from now on; None keeps the present limit.
          default_limit: the limit of a ledger that has none yet.

        Returns:
          the run's id, which is also written into its folder.

        Raises:
          ValueError: the run would exceed the limit, or its delta or unit differs from the
            ledger's; nothing is entered.
        """
        with self._open() as ledger:
            others = sorted({run["unit"] for run in ledger["runs"]} - {unit})
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
                    f"earlier runs have spent {spent:.3f}. Lower --dp-epsilon, or raise the "
                    "limit deliberately with --dp-limit"
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
        """The entry of a run that is about to be resumed; `limit` is as in `admit`.

        Raises:
          ValueError: the run is not in this ledger, or other runs have spent what it still needs.
        """
        with self._open() as ledger:
            runs = _runs(ledger)
            run = self._find(runs, run_id)
            others = [other.counted for other in runs if other is not run]
            total = epsilon([*others, run.planned], ledger["delta"])
            if limit is not None:
                ledger["epsilon_limit"] = limit
            if total > ledger["epsilon_limit"]:
                raise ValueError(
                    f"{self.file}: resuming would bring epsilon to {total:.3f}, above the owner's "
                    f"limit of {ledger['epsilon_limit']:g}: other runs were started since"
                )
            run.folder = str(folder.absolute())
            _put(ledger, runs)
        return run

    def spend(self, run_id: str, step: int, spent_epsilon: float) -> None:
        """Records that a run begins a step, before it does.

        Args:
          run_id: the run.
          step: the step's number, from 1.
          spent_epsilon: of the run, up to and including this step.

        Raises:
          ValueError: it is not the next step, for example because another process trains the same
            run.
        """
        with self._open() as ledger:
            runs = _runs(ledger)
            run = self._find(runs, run_id)
            if step != run.steps + 1 or step > run.planned.steps:
                raise ValueError(
                    f"{self.file}: run {run_id} has begun {run.steps} of {run.planned.steps} "
                    f"steps, so step {step} is not its next one; does another process train the "
                    "same run?"
                )
            run.steps, run.spent_epsilon = step, spent_epsilon
            _put(ledger, runs)

    def spend_rows(self, run_id: str) -> None:
        """Records that a run is about to make its release for the router rows.

        Raises:
          ValueError: the release was made before, or was not planned.
        """
        with self._open() as ledger:
            runs = _runs(ledger)
            run = self._find(runs, run_id)
            if run.rows or run.planned.rows_noise_multiplier is None:
                raise ValueError(
                    f"{self.file}: run {run_id} has spent what was planned for router rows, and "
                    "its release is lost; start a new run in another run folder"
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
            ledger["epsilon_spent"] = epsilon([other.counted for other in runs], ledger["delta"])
            _put(ledger, runs)
        return [other for other in runs if other is not run] + [run]

    def delta(self) -> float | None:
        """The delta of all runs; None before the first run."""
        return self.contents().get("delta")

    def run(self, run_id: str) -> Run:
        """The entry of a run. Raises ValueError if there is none."""
        return self._find(_runs(self._read()), run_id)

    def contents(self) -> dict[str, Any]:
        """The whole ledger, as JSON values."""
        return self._read()

    def _find(self, runs: list[Run], run_id: str) -> Run:
        found = [run for run in runs if run.id == run_id]
        if not found:
            raise ValueError(
                f"{self.file}: run {run_id} is not in this ledger, so what it has spent is not "
                "known; name the ledger that it was entered in with --dp-ledger"
            )
        return found[0]

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """The contents, for this process alone; changes are written on leaving."""
        self._read()  # refuses another file before a lock is created beside it
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as lock:
            try:
                before = self._read()
                ledger = json.loads(json.dumps(before))
                yield ledger
                if ledger != before:
                    _write(self.file, ledger)
            finally:
                is_marked = bool(os.fstat(lock.fileno()).st_size)
                if self.file.exists() and not is_marked:
                    lock.write(WRITTEN)
                elif not is_marked:
                    self._lock.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[TextIO]:
        while True:
            with open(self._lock, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._lock.exists() and os.path.samestat(
                    os.fstat(lock.fileno()), os.stat(self._lock)
                ):
                    yield lock
                    return
            # Another process has deleted the lock while this one waited for it.

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {"format": FORMAT, "runs": []}
        try:
            ledger = json.loads(self.file.read_text(encoding="utf-8"))
            if not isinstance(ledger, dict) or "format" not in ledger:
                raise ValueError("expected an object with a format")
            if ledger["format"] == FORMAT:
                check_ledger(ledger)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.file}: damaged, not a ledger ({error}); what was spent is not known, so "
                "no run starts: restore a copy of it"
            ) from error
        if ledger["format"] != FORMAT:
            raise ValueError(
                f"{self.file}: expected format {FORMAT}, found {ledger['format']!r:.60}; another "
                "version of flexolmo_jax wrote it"
            )
        return ledger


def _is_marked(lock: Path) -> bool:
    """Whether a lock says that its ledger was written."""
    return lock.is_file() and bool(lock.stat().st_size)


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock."""
    with contextlib.suppress(FileNotFoundError), open(lock, "rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
    return True  # its holder has deleted it meanwhile


def _warn(text: str) -> None:
    """Prints to standard error, because standard output may be JSON."""
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
