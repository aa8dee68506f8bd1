"""JSON for scripts, printed in one place: NaN and infinity, which JSON lacks, are never in it."""

import json
from typing import Any


def print_json(value: Any) -> None:
    """Prints a value as JSON, in ASCII; numbers of NumPy and JAX as numbers.

    Raises:
      ValueError: a number in it is NaN or infinite.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False, default=float)
    except ValueError as error:
        raise ValueError(
            f"a number of the result is NaN or infinite, so nothing is printed ({error})"
        ) from error
    print(text)
