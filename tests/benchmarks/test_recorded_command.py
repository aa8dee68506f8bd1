"""What the table of benchmarks says of how it was made."""

import pytest

from benchmarks.__main__ import command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--only", "load", "--out", "/home/me/new page"], "python -m benchmarks --only load"),
        (["--out=/home/me/page", "--rounds", "3"], "python -m benchmarks --rounds 3"),
        (["--sizes", "50M"], "python -m benchmarks --sizes 50M"),
    ],
)
def test_a_command_is_recorded_without_a_path_of_the_machine(words, expected):
    assert command(words) == expected
