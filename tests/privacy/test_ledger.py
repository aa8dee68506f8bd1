"""The owner's ledger: what is written before it happens, and what it refuses."""

import copy
import dataclasses
import json
import signal
import subprocess
import sys
import threading

import pytest

from flexolmo_jax.privacy.accounting import Mechanism, epsilon
from flexolmo_jax.privacy.ledger import MARK, Ledger, marked_run
from flexolmo_jax.privacy.text_marks import digest_of_documents

RUN = Mechanism(200, 16, 32, 10, noise_multiplier=1.5, rows_noise_multiplier=5.0)
DELTA = 1e-5


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "budget.json")


def admit(ledger, folder, limit=None, planned=RUN):
    return ledger.admit("mine", ledger.file.parent / folder, "document", planned, DELTA, limit, 1.5)


def test_one_run_costs(ledger):
    """So that the limits below mean what they seem to."""
    one, two, three = (epsilon([RUN] * number, DELTA) for number in (1, 2, 3))
    assert 1.2 < one < 1.5 < two < 2.0 < three < 2.5


def test_a_run_is_entered_with_its_plan_and_marked_in_its_folder(ledger, tmp_path):
    run = ledger.run(admit(ledger, "run"))
    assert marked_run(tmp_path / "run") == run.id
    assert (run.name, run.unit, run.steps, run.finished) == ("mine", "document", 0, False)
    assert run.planned == RUN and run.planned_epsilon == epsilon([RUN], DELTA)
    contents = json.loads(ledger.file.read_text())
    assert contents["epsilon_limit"] == 1.5 and contents["delta"] == DELTA


def test_a_run_that_would_exceed_the_limit_is_not_entered(ledger, tmp_path):
    admit(ledger, "run")
    before = ledger.file.read_text()
    with pytest.raises(
        ValueError, match=r"bring epsilon to 1\.\d+ .* above the owner's limit of 1.5;"
    ):
        admit(ledger, "another")
    assert ledger.file.read_text() == before and not (tmp_path / "another").exists()
    admit(ledger, "another", limit=2.0)
    assert ledger.contents()["epsilon_limit"] == 2.0
    with pytest.raises(ValueError, match="above the owner's limit of 2; 2 earlier runs"):
        admit(ledger, "third")


def test_all_runs_are_accounted_at_one_delta(ledger, tmp_path):
    assert ledger.delta() is None
    admit(ledger, "run")
    assert ledger.delta() == DELTA
    with pytest.raises(ValueError, match="accounts at delta 1e-05, found 1e-06; give that as"):
        ledger.admit("mine", tmp_path / "b", "document", RUN, 1e-6, 50.0, 2.0)
    assert len(ledger.contents()["runs"]) == 1


def test_of_a_run_that_cannot_be_resumed_only_what_it_spent_counts(ledger, tmp_path):
    run = admit(ledger, "run")
    ledger.spend(run, 1, 0.5)
    with pytest.raises(ValueError, match="above the owner's limit"):
        admit(ledger, "another")
    (tmp_path / "run" / MARK).unlink()
    assert ledger.run(run).counted == dataclasses.replace(RUN, steps=1, rows_noise_multiplier=None)
    admit(ledger, "another")


def test_a_folder_that_another_run_has_taken_does_not_keep_the_first_one_alive(ledger):
    first = admit(ledger, "run")
    admit(ledger, "run", limit=2.0)
    assert ledger.run(first).counted.steps == 0


def test_every_step_is_written_once_and_in_order(ledger):
    run = admit(ledger, "run")
    for step in (1, 2):
        ledger.spend(run, step, step / 10)
        assert json.loads(ledger.file.read_text())["runs"][0]["steps"] == step
    for step in (2, 4):
        with pytest.raises(ValueError, match=f"has begun 2 of 10 steps, so step {step} is not"):
            ledger.spend(run, step, 1.0)
    for step in range(3, 11):
        ledger.spend(run, step, 1.0)
    with pytest.raises(ValueError, match="has begun 10 of 10 steps"):
        ledger.spend(run, 11, 1.0)


def test_the_release_for_router_rows_is_spent_once(ledger):
    run = admit(ledger, "run")
    ledger.spend_rows(run)
    assert ledger.run(run).rows and ledger.run(run).spent_epsilon > 0
    with pytest.raises(ValueError, match="has spent what was planned for router rows"):
        ledger.spend_rows(run)
    other = admit(ledger, "b", 9.0, dataclasses.replace(RUN, rows_noise_multiplier=None))
    with pytest.raises(ValueError, match="has spent what was planned for router rows"):
        ledger.spend_rows(other)


def test_a_finished_run_counts_for_what_it_spent(ledger):
    run = admit(ledger, "run")
    for step in range(1, 11):
        ledger.spend(run, step, 1.0)
    ledger.spend_rows(run)
    (last,) = ledger.finish(run)
    assert last.finished and last.spent == RUN
    assert last.spent_epsilon == epsilon([RUN], DELTA) == ledger.contents()["epsilon_spent"]
    second = admit(ledger, "another", limit=4.0)
    assert [one.id for one in ledger.finish(second)] == [run, second]
    assert [one.id for one in ledger.finish(run)] == [second, run]  # it can be asked again


def test_a_run_goes_on_unless_others_have_taken_its_budget(ledger, tmp_path):
    run = admit(ledger, "run")
    ledger.spend(run, 1, 0.1)
    (tmp_path / "run").rename(tmp_path / "moved")
    admit(ledger, "another")  # the first seems to be gone
    with pytest.raises(ValueError, match="other runs were started since"):
        ledger.resume(run, tmp_path / "moved", None)
    assert ledger.resume(run, tmp_path / "moved", 3.0).steps == 1
    assert ledger.run(run).counted == RUN


def test_a_run_that_is_not_in_the_ledger_is_refused(ledger, tmp_path):
    admit(ledger, "run")
    other = Ledger(tmp_path / "other" / "budget.json")
    with pytest.raises(ValueError, match="is not in this ledger.*--dp-ledger"):
        other.resume(marked_run(tmp_path / "run"), tmp_path / "run", None)


@pytest.mark.parametrize("damage", ['{"format": 1, "runs": [', "[]", '{"format": 1}'])
def test_a_damaged_ledger_starts_nothing(ledger, damage):
    ledger.file.write_text(damage)
    with pytest.raises(ValueError, match="damaged, not a ledger .* no run starts"):
        admit(ledger, "run")
    assert ledger.file.read_text() == damage


def test_the_ledger_of_another_version_is_left_alone(ledger):
    ledger.file.write_text('{"format": 7, "runs": []}')
    with pytest.raises(ValueError, match="expected format 1, found 7"):
        admit(ledger, "run")


def test_runs_at_the_same_time_take_turns(ledger):
    runs = [admit(ledger, f"run{number}", limit=50.0) for number in range(4)]

    def work(run):
        for step in range(1, 6):
            ledger.spend(run, step, 0.1)

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ledger.run(run).steps for run in runs] == [5] * 4
    assert not ledger.file.with_suffix(".partial").exists()


# Which ledger a text has.


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "texts" / "own.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"text": f"Document {n}."}) + "\n" for n in range(5)))
    return file


def first_run(ledger, text):
    """What a private run does with its ledger before it trains."""
    print_of_text = digest_of_documents(text, "text")
    ledger.check_text(str(text), print_of_text)
    run = admit(ledger, "run")
    ledger.mark_text(str(text), print_of_text)
    return run


def test_a_new_ledger_says_that_it_knows_nothing(ledger, text, capsys):
    first_run(ledger, text)
    assert "a new ledger, which knows of no earlier run" in capsys.readouterr().err
    ledger.check_text(str(text), digest_of_documents(text, "text"))
    assert not capsys.readouterr().err


def test_marks_hold_no_text_and_are_found_from_a_copy(ledger, text, tmp_path):
    first_run(ledger, text)
    marks = [text.with_name(".own.jsonl.ledger"), *(tmp_path / "state").rglob("*.json")]
    assert len(marks) == 2 and all("Document" not in mark.read_text() for mark in marks)
    other = Ledger(tmp_path / "other.json")
    copied = tmp_path / "copy.jsonl"
    lines = text.read_text().splitlines(keepends=True)
    copied.write_text("".join(reversed(lines)) + lines[0])  # the same documents
    for source in (text, copied):
        with pytest.raises(ValueError, match="has another ledger, .*budget.json .*--dp-ledger"):
            other.check_text(str(source), digest_of_documents(source, "text"))
    assert not other.file.exists()


def test_a_text_that_has_grown_still_has_its_ledger(ledger, text, tmp_path, capsys):
    first_run(ledger, text)
    with text.open("a") as file:
        file.write('{"text": "Another document."}\n')
    grown = digest_of_documents(text, "text")
    with pytest.raises(ValueError, match="has another ledger"):
        Ledger(tmp_path / "other.json").check_text(str(text), grown)
    capsys.readouterr()
    ledger.check_text(str(text), grown)
    ledger.mark_text(str(text), grown)
    assert "no earlier run on this text as it is now" in capsys.readouterr().err


def test_a_ledger_that_is_gone_is_missed(ledger, text, tmp_path):
    first_run(ledger, text)
    ledger.file.rename(tmp_path / "put_away.json")
    with pytest.raises(ValueError, match="missing, while its lock .* restore the ledger"):
        ledger.check_text(str(text), digest_of_documents(text, "text"))
    with pytest.raises(ValueError, match="the ledger of this text, .*budget.json, is missing"):
        Ledger(tmp_path / "other.json").check_text(str(text), digest_of_documents(text, "text"))
    moved = Ledger(tmp_path / "put_away.json")  # the same ledger at another place
    moved.check_text(str(text), digest_of_documents(text, "text"))
    moved.mark_text(str(text), digest_of_documents(text, "text"))
    assert moved.contents()["file"] == str(tmp_path / "put_away.json")


def test_a_copied_ledger_is_refused_while_the_first_is_there(ledger, text, tmp_path):
    first_run(ledger, text)
    copy = Ledger(tmp_path / "b" / "budget.json")
    copy.file.parent.mkdir()
    copy.file.write_text(ledger.file.read_text())
    with pytest.raises(ValueError, match="a copy of another ledger, .*budget.json"):
        copy.check_text(str(text), digest_of_documents(text, "text"))


def test_a_first_run_that_is_refused_leaves_nothing_behind(ledger, text, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="above the owner's limit of 0.5"):
        admit(ledger, "run", limit=0.5)
    assert sorted(tmp_path.rglob("*")) == before
    first_run(ledger, text)


def test_a_link_to_a_ledger_is_that_ledger(ledger, tmp_path):
    admit(ledger, "run")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.json"
    link.symlink_to(ledger.file)
    admit(Ledger(link), "another", limit=5.0)
    assert link.is_symlink() and len(ledger.contents()["runs"]) == 2


def test_a_ledger_that_another_process_is_about_to_begin_is_not_missed(ledger, text):
    with ledger._open() as contents:  # the lock is there, and the ledger is not yet
        assert not contents["runs"]
        ledger.check_text(str(text), digest_of_documents(text, "text"))
    ledger.check_text(str(text), digest_of_documents(text, "text"))


def test_a_lock_of_a_process_killed_before_it_wrote_the_ledger_does_not_block(ledger, text):
    code = (
        "import os, pathlib, sys; from flexolmo_jax.privacy.ledger import Ledger\n"
        "with Ledger(pathlib.Path(sys.argv[1]))._open(): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, ledger.file], check=False)
    assert killed.returncode == -signal.SIGKILL and ledger._lock.exists()
    assert not ledger.file.exists()
    first_run(ledger, text)
    ledger.file.unlink()  # now the lock shows that there was a ledger
    with pytest.raises(ValueError, match="missing, while its lock"):
        ledger.check_text(str(text), digest_of_documents(text, "text"))


def test_runs_that_were_interrupted_often_stay_accountable(ledger, tmp_path):
    many = dataclasses.replace(RUN, steps=300)
    mechanisms = [dataclasses.replace(many, steps=n) for n in range(1, 301)]
    together = dataclasses.replace(RUN, steps=sum(range(1, 301)), rows_noise_multiplier=None)
    rows = dataclasses.replace(RUN, steps=0, rows_noise_multiplier=5.0 / 300**0.5)
    assert epsilon(mechanisms, DELTA) == pytest.approx(epsilon([together, rows], DELTA), rel=1e-6)


@pytest.mark.parametrize("state", ["a_file", "relative"])
def test_where_no_mark_can_be_left_it_is_said(ledger, text, tmp_path, capsys, monkeypatch, state):
    (tmp_path / "a_file").touch()
    place = state if state == "relative" else str(tmp_path / "a_file")
    monkeypatch.setenv("XDG_STATE_HOME", place)
    first_run(ledger, text)
    assert "cannot be written, so it holds no mark of the ledger" in capsys.readouterr().err
    assert not (tmp_path / "relative").exists()


def test_runs_of_another_unit_are_not_added(ledger, tmp_path):
    admit(ledger, "run")
    before = ledger.file.read_text()
    with pytest.raises(
        ValueError, match="unit document, and this one group:patient; .*cannot be add"
    ):
        ledger.admit("mine", tmp_path / "b", "group:patient", RUN, DELTA, 50.0, 2.0)
    assert ledger.file.read_text() == before


def test_reading_takes_no_lock_and_changes_nothing(ledger, tmp_path, flexolmo, refused):
    admit(ledger, "run")
    beside = tmp_path / "budget.lock"
    beside.write_text("pinned\n")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert flexolmo("privacy", "budget", ledger.file)[0] == 0
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "poetry.toml").write_text("[tool]\n")
    assert "not a ledger" in refused("privacy", "budget", tmp_path / "poetry.toml")
    with pytest.raises(ValueError, match="not a ledger"):
        admit(Ledger(tmp_path / "poetry.toml"), "another")
    assert not list(tmp_path.glob("*poetry*lock"))


VALUES = (None, True, -1, 1.5, 2**70, "", "x", [], {}, [[]], float("nan"), float("inf"))


def test_every_field_that_is_missing_unknown_or_of_another_type_is_damage(ledger):
    """One line names the file, the run and the field; a run field is checked like all others."""
    run = admit(ledger, "run")
    ledger.spend(run, 1, 0.1)
    ledger.mark_text("corpus:math", "0" * 64)
    written = json.loads(ledger.file.read_text())
    optional = {"id", "file", "texts", "epsilon_spent"}
    places = [((), name) for name in written] + [(("runs", 0), name) for name in written["runs"][0]]
    for path, name in places:
        for change in ("removed", *VALUES):
            changed = copy.deepcopy(written)
            holder = changed["runs"][0] if path else changed
            before = holder.pop(name)
            if change == "removed" and not path and name in optional:
                continue
            if change != "removed":
                holder[name] = change
            if change != "removed" and is_right(name, change, before):
                continue
            message = refusal(ledger, changed)
            assert "run 1" in message or not path, (name, change, message)
            assert name in message or name == "runs", (name, change, message)


def is_right(name, value, before):
    """Whether a value of VALUES may stand in a field."""
    if isinstance(before, str):
        return isinstance(value, str) and bool(value) and name != "started"
    if isinstance(before, bool):
        return isinstance(value, bool)
    if isinstance(before, list):
        return value == [] and name == "texts"
    if "epsilon" in name:
        return value in (1.5, 2**70) and not isinstance(value, bool)
    return False


def refusal(ledger, changed):
    ledger.file.write_text(json.dumps(changed))
    with pytest.raises(
        ValueError, match="^[^\n]*(damaged, not a ledger|expected format)"
    ) as raised:
        ledger.contents()
    message = str(raised.value)
    assert message.startswith(str(ledger.file)) and message.isprintable()
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update({"\x1b[0m": 1}), r"unknown field '\\x1b\[0m'"),
        (lambda x: x["runs"][0].update(more=1), "run 1: unknown field 'more'"),
        (
            lambda x: x["runs"][0]["planned"].pop("units"),
            "run 1: field 'planned' must be an object",
        ),
        (lambda x: x["runs"][0]["planned"].update(units=0), "'planned' must be a mechanism .units"),
        (lambda x: x["runs"][0].update(steps=11), "'steps' must be at most the 10 planned steps"),
        (lambda x: x["runs"].append(x["runs"][0]), "two runs have the same field 'id'"),
        (lambda x: x["runs"].append("a run"), "run 2: expected an object, found 'a run'"),
        (lambda x: x.pop("delta"), "field 'delta': expected it if, and only if, there are runs"),
        (lambda x: x.update(file="x" * 10**6 + "\n", id=3), "field 'id' must be a text"),
    ],
)
def test_fields_that_do_not_belong_together_are_damage(ledger, change, message):
    admit(ledger, "run")
    changed = json.loads(ledger.file.read_text())
    change(changed)
    ledger.file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"damaged, not a ledger .*{message}"):
        ledger.contents()
