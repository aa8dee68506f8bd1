"""The fields of a ledger: each is checked on reading, because anyone may have edited the file.

A field that is missing, unknown, of another type or out of range means that what was spent is not
known. Messages name the run and the field.
"""

import dataclasses
import datetime
import math
from collections.abc import Callable
from typing import Any

from flexolmo_jax.privacy.accounting import Mechanism

SHOWN = 60  # characters of a wrong value in a message


def check_ledger(ledger: dict[str, Any]) -> None:
    """Checks all fields of a ledger of the current format.

    Args:
      ledger: JSON values, as read.

    Raises:
      ValueError: a field is missing, unknown, of another type or out of range.
    """
    _check_fields("", ledger, LEDGER_FIELDS, optional=LEDGER_FIELDS.keys() - {"format", "runs"})
    for number, run in enumerate(ledger["runs"], 1):
        where = f"run {number}"
        if not isinstance(run, dict):
            raise ValueError(f"{where}: expected an object, found {_shown(run)}")
        _check_fields(where, run, RUN_FIELDS)
        if run["steps"] > run["planned"]["steps"]:
            raise ValueError(
                f"{where}: field 'steps' must be at most the {run['planned']['steps']} planned "
                f"steps, found {run['steps']}"
            )
        if run["rows"] and run["planned"]["rows_noise_multiplier"] is None:
            raise ValueError(f"{where}: field 'rows' is true, and no release was planned")
    ids = [run["id"] for run in ledger["runs"]]
    if len(set(ids)) < len(ids):
        raise ValueError("two runs have the same field 'id'")
    for name in ("delta", "epsilon_limit"):
        if bool(ledger["runs"]) != (name in ledger):
            raise ValueError(
                f"field {name!r}: expected it if, and only if, there are runs; there are {len(ids)}"
            )


def _check_fields(
    where: str,
    found: dict[str, Any],
    fields: dict[str, Callable[[Any], str | None]],
    optional: Any = (),
) -> None:
    place = f"{where}: " if where else ""
    for name in sorted(fields.keys() - optional - found.keys()):
        raise ValueError(f"{place}field {name!r} is missing")
    for name, value in found.items():
        if name not in fields:
            raise ValueError(f"{place}unknown field {_shown(name)}")
        if expected := fields[name](value):
            raise ValueError(f"{place}field {name!r} must be {expected}, found {_shown(value)}")


# Checks return what was expected, or None if the value is right.


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "a text that is not empty"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _count(value: Any) -> str | None:
    return None if type(value) is int and value >= 0 else "a whole number from 0"


def _epsilon(value: Any) -> str | None:
    is_number = type(value) in (int, float)
    return None if is_number and 0 <= value < math.inf else "a finite number from 0"


def _delta(value: Any) -> str | None:
    return None if type(value) is float and 0 < value < 1 else "a number in (0, 1)"


def _list(value: Any) -> str | None:
    return None if isinstance(value, list) else "a list"


def _texts(value: Any) -> str | None:
    right = isinstance(value, list) and all(isinstance(x, str) for x in value)
    return None if right else "a list of fingerprints"


def _time(value: Any) -> str | None:
    try:
        datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return "a time"
    return None


def _mechanism(value: Any) -> str | None:
    names = [field.name for field in dataclasses.fields(Mechanism)]
    if not isinstance(value, dict) or value.keys() != set(names):
        return f"an object with {', '.join(names)}"
    try:
        Mechanism(**value)
    except (ValueError, OverflowError) as error:
        return f"a mechanism ({error})"
    return None


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


LEDGER_FIELDS: dict[str, Callable[[Any], str | None]] = {
    "format": _count,
    "runs": _list,
    "delta": _delta,
    "epsilon_limit": _epsilon,
    "epsilon_spent": _epsilon,
    "id": _text,
    "file": _text,
    "texts": _texts,
}
RUN_FIELDS: dict[str, Callable[[Any], str | None]] = {
    "id": _text,
    "name": _text,
    "folder": _text,
    "unit": _text,
    "planned": _mechanism,
    "planned_epsilon": _epsilon,
    "steps": _count,
    "rows": _flag,
    "spent_epsilon": _epsilon,
    "finished": _flag,
    "started": _time,
}
