"""A few of the attempts of `python -m tests.hostile`; all of them are a command of their own."""

import os
import subprocess
import sys
from pathlib import Path


def test_nothing_hostile_is_accepted_and_nothing_ends_in_a_traceback():
    ran = subprocess.run(
        [sys.executable, "-m", "tests.hostile", "--count", "50", "--seconds", "120"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "; 0 faults;" in ran.stdout
