"""Tests that need several devices or several processes, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

PARALLEL = Path(__file__).parent / "parallel"


def test_eight_devices_compute_what_one_does():
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "-c", "/dev/null", str(PARALLEL / "eight_devices.py")],
        capture_output=True, text=True, cwd=PARALLEL.parent.parent,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},  # compiles sooner
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
