"""Excerpts: an owner's own lines of a ledger, and the signature that shows that they are all.

A file of JSON lines. The first holds a statement of the coordinator's last checkpoint and its
signature; the others are the owner's lines. They are hashed to the head of the owner's chain, and
added up to its totals, both of which the statement has: a line that was dropped, altered, moved or
made up changes the head.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.storage.files import new_file
from flexolmo_jax.usage import entries
from flexolmo_jax.usage.entries import State
from flexolmo_jax.usage.ledger import (
    FORMAT,
    NOTHING,
    Contents,
    check_signatures,
    next_state,
    replay,
)
from flexolmo_jax.usage.signing import canonical, is_signed

_TYPES = {
    "what": str, "ledger": str, "ledger_lines": int, "ledger_head": str, "time": str, "owner": str,
    "lines": int, "requests": int, "tokens": int, "mass": float, "head": str,
}  # fmt: skip


class Excerpt(NamedTuple):
    """A verified excerpt.

    Attributes:
      statement: what the coordinator signed (`ledger.Checkpoint.statement`).
      lines: the owner's, in their order.
      heads: of the owner's chain after 0, 1, ... lines.
    """

    statement: dict[str, Any]
    lines: list[dict[str, Any]]
    heads: list[str]


def extract(file: Path, owner: str, out: Path) -> Excerpt:
    """Writes an owner's lines up to the last checkpoint.

    Raises:
      ValueError: the ledger is damaged, nothing in it is signed yet, it has no line of this owner,
        or `out` is there.
      OSError: a file cannot be read or written.
    """
    if out.exists():
        raise ValueError(f"{out}: already there; choose another --out (an owner keeps each one)")
    lines: list[dict[str, Any]] = []

    def see(record: dict[str, Any]) -> None:
        own = entries.seen_by(owner, record)
        if own is not None:
            lines.append(own)

    contents = replay(file, see)
    signed = check_signatures(contents, file)
    if owner not in signed.states:
        known = ", ".join(sorted(signed.states))
        raise ValueError(f"{file}: no signed line of {owner!r}; there are those of {known}")
    del lines[signed.states[owner].lines :]
    statement = signed.statement(contents.ledger, owner)
    head = {"statement": statement, "signature": signed.signatures[owner]}
    with new_file(out, "wb") as opened:
        for value in (head, *lines):
            opened.write(canonical(value) + b"\n")
    return verify_excerpt(out, contents.key)


def verify_excerpt(file: Path, key: str, owner: str | None = None) -> Excerpt:
    """Reads an excerpt, and checks that it has all lines of its owner, as they were signed.

    Args:
      file: of `extract`.
      key: the coordinator's public key, hexadecimal, known from elsewhere.
      owner: whose excerpt it should be; None: anybody's.

    Raises:
      ValueError: it is damaged, a line was dropped, altered, moved or added, the signature is not
        one of this key, or it is another owner's.
    """
    first, *rest = _values(file)
    statement: dict[str, Any] = first.get("statement", {})
    is_head = first.keys() == {"statement", "signature"} and isinstance(statement, dict)
    if not is_head or {name: type(x) for name, x in statement.items()} != _TYPES:
        raise ValueError(f"{file}, line 1: expected the signed statement of a usage excerpt")
    if statement["what"] != f"flexolmo usage {FORMAT}":
        raise ValueError(f"{file}: expected format {FORMAT}, found {statement['what']!r}")
    if not is_signed(key, statement, first["signature"]):
        raise ValueError(f"{file}, line 1: not signed with this key, or altered afterwards")
    if owner is not None and statement["owner"] != owner:
        raise ValueError(f"{file}: expected lines of {owner!r}, found {statement['owner']!r}")
    state, heads = NOTHING, [NOTHING.head]
    for number, line in enumerate(rest, 2):
        _check_line(line, f"{file}, line {number}")
        state = next_state(state, line)
        heads.append(state.head)
    if state != State(*(statement[name] for name in State._fields)):
        raise ValueError(
            f"{file}: a line was dropped, altered, moved or added: expected "
            f"{statement['lines']:,} lines with the head {statement['head'][:16]}..., found "
            f"{state.lines:,} with {state.head[:16]}..."
        )
    return Excerpt(statement, rest, heads)


def verify_ledger(file: Path, key: str) -> Contents:
    """Reads a whole ledger, and checks that all of it is signed.

    Raises:
      ValueError: it is damaged, or not signed to its end, or with another key.
    """
    contents = replay(file)
    if contents.key != key:
        raise ValueError(f"{file}: signed with another key ({contents.key[:16]}...) than this one")
    signed = check_signatures(contents, file)
    if contents.unsigned:
        raise ValueError(
            f"{file}: lines 1 to {signed.lines:,} are intact and signed, the {contents.unsigned:,} "
            "after that not yet: the server signs once a minute, and when it ends"
        )
    return contents


def check_follows(file: Path, later: Excerpt, earlier: Excerpt) -> None:
    """Checks that an excerpt continues an earlier one of the same owner.

    Raises:
      ValueError: the ledger is another one, or its history was rewritten; names `file`.
    """
    new, old = later.statement, earlier.statement
    for name in ("ledger", "owner"):
        if new[name] != old[name]:
            raise ValueError(
                f"{file}: of another {name} ({new[name]}) than the earlier one ({old[name]})"
            )
    is_older = new["ledger_lines"] < old["ledger_lines"] or new["lines"] < old["lines"]
    if is_older:
        raise ValueError(f"{file}: ends before the earlier one: lines were removed, or swap them")
    same_ledger = new["ledger_lines"] > old["ledger_lines"] or (
        new["ledger_head"] == old["ledger_head"]
    )
    if later.heads[old["lines"]] != old["head"] or not same_ledger:
        raise ValueError(f"{file}: the history was rewritten since the earlier one was signed")


def check_contains(file: Path, earlier: Excerpt) -> None:
    """Checks that a whole ledger, verified already, has what an excerpt states of it.

    Raises:
      ValueError: it is another ledger, or its history was rewritten.
    """
    statement, found = earlier.statement, []
    lines, head, owner = (statement[name] for name in ("ledger_lines", "ledger_head", "owner"))

    def see(record: dict[str, Any]) -> None:
        if record["number"] == lines:
            found.append(record["digest"])

    contents = replay(file, see)
    if contents.ledger != statement["ledger"]:
        raise ValueError(f"{file}: another ledger than that of the earlier excerpt")
    if found != [head] or owner not in contents.states:
        raise ValueError(f"{file}: the history was rewritten since the excerpt was signed")


def months(excerpt: Excerpt) -> list[dict[str, Any]]:
    """What the owner's lines add up to, by month."""
    rows: dict[str, dict[str, Any]] = {}
    for line in excerpt.lines:
        if line["kind"] == entries.USE:
            nothing = {"month": line["time"][:7], "requests": 0, "tokens": 0, "mass": 0.0}
            row = rows.setdefault(line["time"][:7], nothing)
            row["requests"] += 1
            row["tokens"] += line["tokens"]
            row["mass"] = round(row["mass"] + line["mass"], 4)
    return list(rows.values())


def is_excerpt(file: Path) -> bool:
    """Whether a file begins as an excerpt does. Raises ValueError if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            return opened.read(14).replace(b" ", b"").startswith(b'{"signature"')
    except OSError as error:
        raise ValueError(f"{file}: expected an excerpt, or a ledger ({error.strerror})") from error


def _values(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, each spelled canonically."""
    values = []
    data = file.read_bytes()
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            value = json.loads(line)
            is_sound = isinstance(value, dict) and canonical(value) == line
        except (ValueError, RecursionError):  # of Unicode and JSON, too
            is_sound = False
        if not is_sound:
            raise ValueError(f"{file}, line {number}: damaged, no line of a usage excerpt")
        values.append(value)
    if not data.endswith(b"\n"):
        raise ValueError(f"{file}: its end is missing")
    return values


def _check_line(line: dict[str, Any], where: str) -> None:
    """As `entries.check`, of what an owner sees."""
    whole = dict(line)
    if not isinstance(whole.pop("time", None), str):
        raise ValueError(f"{where}: a line without a time")
    whole["mass"] = {"own": line.get("mass")}
    if line.get("kind") == entries.SAMPLE:
        whole["bits"] = {"own": line["bits"]} if "bits" in line else {}
    entries.check(whole, where)
