"""A few of the attempts of `python -m tests.forged`; all of them are a command of their own."""

import os
import subprocess
import sys
from pathlib import Path


def test_nothing_forged_is_accepted():
    ran = subprocess.run(
        [sys.executable, "-m", "tests.forged", "--count", "48", "--seconds", "120"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "48 attempts; 0 faults;" in ran.stdout
