"""Locks between processes: who waits, who is refused, and what a killed process leaves."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flexolmo_jax.storage.locks import locked, private_folder

HOLD = """import sys, time
from pathlib import Path
from flexolmo_jax.storage.locks import locked
with locked(Path(sys.argv[1]), "is working", "wait"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path):
    """hold(seconds): a process that holds tmp_path/lock."""
    processes = []

    def hold(seconds: float = 600) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, tmp_path / "lock", str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        processes.append(process)
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def take(folder, wait=0.0):
    with locked(folder / "lock", "is working", "wait until it has ended", wait):
        return True


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path, holder):
    process = holder()
    with pytest.raises(ValueError) as refused:
        take(tmp_path)
    said = str(refused.value)
    assert f"process {process.pid} on '{os.uname().nodename}'" in said
    assert "is working; wait until it has ended" in said and "\n" not in said


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder):
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "lock").exists()  # left behind, and held by nobody
    assert take(tmp_path)
    assert not (tmp_path / "lock").exists()


def test_one_that_waits_comes_after_the_other(tmp_path, holder):
    process = holder(0.5)
    assert take(tmp_path, wait=60)
    assert process.wait(timeout=60) == 0


def test_never_two_at_a_time_though_the_file_is_removed_each_time(tmp_path):
    inside, most, rounds = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, rounds
        for _ in range(40):
            with locked(tmp_path / "lock", "is working", "wait", wait=60):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.0002)
                with guard:
                    inside -= 1
                    rounds += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, rounds) == (1, 160)


def test_only_the_owner_can_read_a_private_folder(tmp_path):
    empty, shared = tmp_path / "empty", tmp_path / "shared"
    for folder in (empty, shared):
        folder.mkdir(mode=0o755)
    (shared / "notes.txt").write_text("for all of us")
    assert private_folder(tmp_path / "above" / "new") and private_folder(empty)
    assert not private_folder(shared)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("above/new", "empty", "shared")]
    assert modes == [0o700, 0o700, 0o755]
