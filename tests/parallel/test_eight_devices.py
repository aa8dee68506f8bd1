"""Several devices compute what one does, in a process that has eight virtual devices."""

import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parent / "eight_devices.py"


def test_eight_devices_compute_what_one_does():
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "-c", "/dev/null", str(FILE)],
        capture_output=True, text=True, cwd=FILE.parents[2],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
