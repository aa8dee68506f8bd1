"""A tenth of the runs of tests/chaos; all of them are commands of their own."""

import subprocess
import sys
from pathlib import Path


def chaos(script, *arguments):
    command = [sys.executable, Path(__file__).parent / "chaos" / script, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    return ran.stdout


def test_runs_that_are_killed_lose_nothing():
    assert "0 runs failed" in chaos("kill.py", "--kills", "10")


def test_no_change_of_a_merged_model_undoes_another():
    assert "20 rounds, 0 with a change undone or lost" in chaos("races.py", "--rounds", "20")
