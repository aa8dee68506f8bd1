"""A few of the runs of tests/chaos/kill.py; all of them are a command of their own."""

import subprocess
import sys
from pathlib import Path


def test_runs_that_are_killed_lose_nothing():
    script = Path(__file__).parent / "chaos" / "kill.py"
    ran = subprocess.run([sys.executable, script, "--runs", "5"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "0 runs failed" in ran.stdout
