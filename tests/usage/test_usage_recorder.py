"""The thread that writes a ledger: nobody waits for it, and little is lost when it is killed."""

import logging
import subprocess
import sys
import threading
import time

from flexolmo_jax.usage import excerpts, recorder
from flexolmo_jax.usage.ledger import replay
from flexolmo_jax.usage.recorder import Recorder

KILLED = """
import sys, time
from pathlib import Path
from flexolmo_jax.usage import entries
from flexolmo_jax.usage.ledger import Ledger
from flexolmo_jax.usage.recorder import Recorder
from flexolmo_jax.usage.signing import read_private

recorder = Recorder(Ledger(Path(sys.argv[1]), read_private(Path(sys.argv[2]))))
while True:
    recorder.add(entries.use("m", 1, 1, {"math": 1.0}))
    print("added", flush=True)
    time.sleep(0.001)
"""


def test_what_was_added_is_written_and_signed_at_the_end(kept):
    log = Recorder(kept.open())
    for record in kept.records(30):
        log.add(record)
    log.close()
    assert excerpts.verify_ledger(kept.file, kept.key).lines == 1 + 30 + 1


def test_nobody_waits_for_the_disk(kept, monkeypatch):
    monkeypatch.setattr(recorder, "WRITE_SECONDS", 0.01)
    opened, blocked, free = kept.open(), threading.Event(), threading.Event()
    append = opened.append

    def slow(records):
        blocked.set()
        free.wait(10)
        append(records)

    monkeypatch.setattr(opened, "append", slow)
    log = Recorder(opened)
    first, *rest = kept.records(20)
    log.add(first)
    assert blocked.wait(10)
    begun = time.monotonic()
    for record in rest:
        log.add(record)
    assert time.monotonic() - begun < 0.1
    free.set()
    log.close()
    assert excerpts.verify_ledger(kept.file, kept.key).lines == 1 + 20 + 1


def test_what_a_full_disk_refused_is_written_later_and_said_once(kept, monkeypatch, caplog):
    monkeypatch.setattr(recorder, "WRITE_SECONDS", 0.01)
    opened, calls = kept.open(), []
    append = opened.append

    def full(records):
        calls.append(records)
        if len(calls) < 4:
            raise OSError(28, "No space left on device")
        append(records)

    monkeypatch.setattr(opened, "append", full)
    log = Recorder(opened)
    with caplog.at_level(logging.ERROR):
        log.add(kept.records(1)[0])
        while len(calls) < 4:
            time.sleep(0.01)
        log.close()
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert excerpts.verify_ledger(kept.file, kept.key).lines == 3


def test_an_impossible_entry_is_logged_and_keeps_no_other_from_being_written(kept, caplog):
    log = Recorder(kept.open())
    log.add({**kept.records(1)[0], "tokens": 0})
    log.add(kept.records(1)[0])
    log.close()
    assert "impossible value" in caplog.text
    assert excerpts.verify_ledger(kept.file, kept.key).lines == 3


def test_lines_are_signed_while_it_runs(kept, monkeypatch):
    monkeypatch.setattr(recorder, "WRITE_SECONDS", 0.01)
    monkeypatch.setattr(recorder, "SIGN_SECONDS", 0.05)
    log = Recorder(kept.open())
    log.add(kept.records(1)[0])
    deadline = time.monotonic() + 10
    while replay(kept.file).unsigned or replay(kept.file).lines < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    log.close()


def test_of_a_killed_process_the_last_second_is_lost_at_most(kept):
    words = [sys.executable, "-c", KILLED, kept.file, kept.secret]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        added, begun = 0, time.monotonic()
        while time.monotonic() - begun < 1.5:
            assert process.stdout.readline() == "added\n"
            added += 1
            if time.monotonic() - begun < 0.5:
                before = added
        process.kill()
    assert replay(kept.file).lines > before
    kept.add(*kept.records(1))  # and it is continued
    assert excerpts.verify_ledger(kept.file, kept.key).unsigned == 0
