"""Changes of a registry's log: its bytes, its lines, and lines of those who may not write it."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from flexolmo_jax.storage import hash_chain
from flexolmo_jax.storage.files import canonical_digest
from flexolmo_jax.trust import log, registry_changes
from flexolmo_jax.trust.keys import key_id, sign
from flexolmo_jax.trust.registry import Registry
from flexolmo_jax.trust.signers import time_text, utc_now
from tests.forged.signatures import ORDER, mutate
from tests.forged.world import World

# Who may not write the log: an owner, one not in the registry, one whose time has not come, one
# whose key was revoked.
FORGERS = ("math", "publisher", "stranger", "late", "gone")
PARTS = ("registry", "mine")
Record = dict[str, Any]


def change(draw: random.Random, world: World) -> str:
    """Changes the log that the verifier is given, and says how."""
    one = draw.choice((file, file, lines, lines, values, values, by_another, by_another, by_itself))
    return one(draw, world)


def conclusion(world: World) -> Any:
    """The entries that a verifier reads in the log that it is given.

    That the end is missing, below the line that the registry names, can only be told by whoever has
    seen more of it; everything else, without that.
    """
    entries = log.read(Registry.open(world.registry))
    if len(entries) < len(log.read(Registry.open(world.mine))):
        registry_changes.update(world.mine, world.registry)
    return entries


def file(draw: random.Random, world: World) -> str:
    """The file as a whole."""
    path = _path(world)
    data = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
    kinds: dict[str, Callable[[], Any]] = {
        "flipped": lambda: path.write_bytes(bytes([*data[:at], data[at] ^ bit, *data[at + 1 :]])),
        "cut": lambda: path.write_bytes(data[:at]),
        "grown": lambda: path.write_bytes(
            bytes(data) + draw.choice((b"{}\n", b"\n", b"\0", b" ", bytes(data), b"[" * 100_000))
        ),
        "a byte order mark": lambda: path.write_bytes(b"\xef\xbb\xbf" + data),
        "carriage returns": lambda: path.write_bytes(data.replace(b"\n", b"\r\n")),
        "deleted": path.unlink,
        "empty": lambda: path.write_bytes(b""),
        "a link": lambda: (path.rename(f"{path}.moved"), path.symlink_to(f"{path}.moved")),
        "a folder": lambda: (path.unlink(), path.mkdir()),
        "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
    }
    what = draw.choice(list(kinds))
    kinds[what]()
    return what


def lines(draw: random.Random, world: World) -> str:
    """Lines dropped, moved, repeated or spelled otherwise; the chain may be computed again."""
    records = _records(world)
    one, other = draw.sample(range(len(records)), 2)
    kinds: dict[str, Callable[[], Any]] = {
        "dropped": lambda: records.pop(one),
        "swapped": lambda: records.insert(one, records.pop(other)),
        "repeated": lambda: records.insert(one, records[other]),
        "reversed": records.reverse,
        "sorted": lambda: records.__setitem__(one, dict(sorted(records[one].items()))),
        "another's signature": lambda: records[one].update(signature=records[other]["signature"]),
        "the other form of a signature": lambda: records[one].update(_other_form(records[one])),
        "all dropped": records.clear,
    }
    what = draw.choice(list(kinds))
    kinds[what]()
    return f"{what}, {_write(draw, world, records)}"


def values(draw: random.Random, world: World) -> str:
    """One value of the log's JSON; the signatures are as they were."""
    records = _records(world)
    what = mutate(draw, records)
    return f"{what}, {_write(draw, world, records)}"


def by_another(draw: random.Random, world: World) -> str:
    """A line of somebody who may not write it, however it is dated; or of another registry."""
    records, place = _records(world), draw.randrange(4)
    record = _line(draw, world)
    record["time"] = draw.choice((time_text(utc_now()), records[0]["time"], "2040-01-01T00:00:00Z"))
    name = draw.choice((*FORGERS, "hub"))
    digest = Registry.open(world.registry).first_digest
    if name == "hub":
        digest = hashlib.sha256(b"another registry").hexdigest()
    claimed = draw.choice((name, name, "hub"))
    record["key"] = key_id(world.public(claimed))
    if draw.random() < 0.3 and place < len(records):
        records.pop(place)
    records.insert(place, record)
    for number, own in enumerate(records, 1):
        own.update(number=number, before=hash_chain.START)
        if number > 1:
            own["before"] = _digest(records[number - 2])
        if own is record:
            own["signature"] = _signed(own, world.key(name), digest)
    _path(world).write_text("".join(_spelled(own) + "\n" for own in records))
    return f"line {place + 1} by {name}, as {claimed}'s"


def by_itself(draw: random.Random, world: World) -> str:
    """A line that says what no line can, by the coordinator."""
    records = _records(world)
    record = _line(draw, world)
    record["key"] = key_id(world.public("hub"))
    field, value = draw.choice((
        ("event", "promoted"), ("event", None), ("expert", "public"), ("expert", ["math"]),
        ("expert", "../math"), ("package", "x"), ("package", "AB" * 32), ("reason", ""),
        ("reason", "a\nb"), ("reason", "a\x1b[31m"), ("report", 7), ("more", 1), ("number", 9),
        ("number", True), ("before", "0" * 64), ("time", "2026-11-29"), ("time", 0),
    ))  # fmt: skip
    record.update(number=4, before=_digest(records[-1]))
    record[field] = value
    digest = Registry.open(world.registry).first_digest
    record["signature"] = _signed(record, world.key("hub"), digest)
    _path(world).write_text("".join(_spelled(own) + "\n" for own in [*records, record]))
    return f"by the coordinator: {field} {value!r}"


def _line(draw: random.Random, world: World) -> Record:
    digest = json.loads((world.root / "experts" / "math" / "manifest.json").read_text())["digest"]
    event = draw.choice((log.REVOKED, log.REINSTATED, log.ADMITTED, log.REJECTED))
    return {
        "number": 0, "time": time_text(utc_now()), "before": "", "event": event, "expert": "math",
        "package": digest, "reason": "forged", "report": None, "key": "", "signature": "",
    }  # fmt: skip


def _write(draw: random.Random, world: World, records: Any) -> str:
    is_chained = isinstance(records, list) and draw.random() < 0.7
    if is_chained:
        before = hash_chain.START
        for number, record in enumerate(records, 1):
            if isinstance(record, dict):
                record.update(number=number, before=before)
                before = _digest(record)
    written = [_spelled(record) + "\n" for record in records]
    _path(world).write_text("".join(written), encoding="utf-8", errors="surrogatepass")
    return "chained again" if is_chained else "as they were chained"


def _records(world: World) -> list[Record]:
    return [json.loads(line) for line in _path(world).read_text().splitlines()]


def _spelled(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False)


def _digest(record: Any) -> str:
    return hashlib.sha256(_spelled(record).encode(errors="surrogatepass")).hexdigest()


def _signed(record: Record, key: Any, registry: str) -> str:
    kept = {name: value for name, value in record.items() if name != "signature"}
    r, s = decode_dss_signature(
        sign(key, f"flexolmo log 1 {registry} {canonical_digest(kept)}".encode())
    )
    return f"{r:064x}{min(s, ORDER - s):064x}"


def _other_form(record: Record) -> Record:
    r, s = record["signature"][:64], int(record["signature"][64:], 16)
    return {"signature": r + f"{ORDER - s:064x}"}


def _path(world: World) -> Path:
    return world.registry / "log.jsonl"
