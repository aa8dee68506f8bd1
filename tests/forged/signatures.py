"""Changes of a signature file: its bytes, its JSON, its statement, and who signed it."""

import base64
import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from flexolmo_jax.trust.bundle import PAYLOAD_TYPE, hint_of
from flexolmo_jax.trust.keys import sign
from tests.forged.world import SIGNED, SIGNERS, World
from tests.hostile import mutations

PARTS = tuple(f"{package}.sig" for package in SIGNED)
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256


def change(draw: random.Random, world: World) -> str:
    """Changes one signature, and says how."""
    package = draw.choice(list(SIGNED))
    file = world.root / f"{package}.sig"
    if draw.random() < 0.3:
        return f"{file.name}: {_file(draw, file, world)}"
    value = json.loads(file.read_text())
    one = draw.choice((json_value, spelling, statement, other_form, signers, by_another, by_itself))
    what = one(draw, value, world, package)
    if one is not spelling:
        file.write_text(json.dumps(value))
    return f"{file.name}: {what}"


def conclusion(world: World) -> Any:
    """Which packages are signed by whom."""
    return world.verified()


def _file(draw: random.Random, file: Path, world: World) -> str:
    data = bytearray(file.read_bytes())
    at = draw.randrange(len(data))
    other = world.root / f"{draw.choice([name for name in SIGNED if name != file.stem])}.sig"
    kinds: dict[str, Callable[[], Any]] = {
        "flipped": lambda: file.write_bytes(
            bytes([*data[:at], data[at] ^ 1 << draw.randrange(8), *data[at + 1 :]])
        ),
        "cut": lambda: file.write_bytes(data[:at]),
        "grown": lambda: file.write_bytes(
            bytes(data) + draw.choice((b"{}", b"\0", b" x", bytes(data)))
        ),
        "deleted": file.unlink,
        "that of another": lambda: file.write_bytes(other.read_bytes()),
        "a link": lambda: (file.rename(f"{file}.moved"), file.symlink_to(f"{file}.moved")),
        "a folder": lambda: (file.unlink(), file.mkdir()),
        "empty": lambda: file.write_bytes(b""),
        "huge": lambda: file.write_bytes(b"[" * (17 * 2**20)),
        "deep": lambda: file.write_bytes(b"[" * 100_000),
    }
    what = draw.choice(list(kinds))
    kinds[what]()
    return what


def json_value(draw: random.Random, value: Any, world: World, package: str) -> str:
    """One value of the bundle's JSON is replaced, removed or added."""
    return mutate(draw, value)


def spelling(draw: random.Random, value: Any, world: World, package: str) -> str:
    """The same JSON, spelled otherwise; or a key twice."""
    file = world.root / f"{package}.sig"
    text = file.read_text()
    made = {
        "indented": json.dumps(value, indent=draw.choice((1, 4))),
        "sorted": json.dumps(value, sort_keys=True),
        "with a byte order mark": "\ufeff" + text,
        "with spaces after it": text + "\n  \n",
        "a key twice": text.replace("{", '{"mediaType": "x", ', 1),
        "a payload twice": text.replace('"payload"', '"payload": "eA==", "payload"', 1),
        "base64 with a line end": text.replace('"payload": "', '"payload": "\\n', 1).replace(
            '"payload":"', '"payload":"\\n', 1
        ),
    }
    what = draw.choice(list(made))
    file.write_text(made[what])
    return what


def statement(draw: random.Random, value: Any, world: World, package: str) -> str:
    """The statement is changed, and nobody signs it."""
    made = _statement(value)
    what = draw.choice((mutate, _listed))(draw, made)
    _put(value, made)
    return f"unsigned: {what}"


def other_form(draw: random.Random, value: Any, world: World, package: str) -> str:
    """Other numbers in the signature; (r, -s) is the same signature in its other form."""
    place = value["dsseEnvelope"]["signatures"][0]
    r, s = decode_dss_signature(base64.b64decode(place["sig"]))
    forms = {
        "(r, -s)": (r, ORDER - s), "(r + 1, s)": (r + 1, s), "(r, s + n)": (r, s + ORDER),
        "(s, r)": (s, r), "(0, 0)": (0, 0), "(n, n)": (ORDER, ORDER), "(1, 1)": (1, 1),
    }  # fmt: skip
    what = draw.choice(list(forms))
    data = encode_dss_signature(*forms[what])
    if draw.random() < 0.3:
        data, what = data + b"\0", f"{what} and a byte"
    place["sig"] = base64.b64encode(data).decode()
    return what


def signers(draw: random.Random, value: Any, world: World, package: str) -> str:
    """The key that is named, or the number of signatures."""
    known = {name: hint_of(world.public(name)) for name in (*SIGNERS, "stranger")}
    name = draw.choice([name for name in known if name != SIGNED[package]])
    signatures = value["dsseEnvelope"]["signatures"]
    what = draw.choice(("named", "twice", "none", "keyid", "bad first"))
    if what == "named":
        value["verificationMaterial"]["publicKey"]["hint"] = known[name]
    elif what == "twice":
        signatures.append(copy.deepcopy(signatures[0]))
    elif what == "none":
        signatures.clear()
    elif what == "keyid":
        signatures[0]["keyid"] = known[name]
    else:
        signatures.insert(0, {"sig": "AAAA"})
    return f"{what} {name}"


def by_another(draw: random.Random, value: Any, world: World, package: str) -> str:
    """Signed by somebody who may not sign this package, not now, or no longer."""
    name = draw.choice([name for name in (*SIGNERS, "stranger") if name != SIGNED[package]])
    made, what = _statement(value), "as it is"
    if draw.random() < 0.5:
        what = _listed(draw, made)
    _put(value, made)
    _sign(value, world, name)
    if name == "stranger" and draw.random() < 0.5:
        right = hint_of(world.public(SIGNED[package]))
        value["verificationMaterial"]["publicKey"]["hint"] = right
    return f"signed by {name}: {what}"


def by_itself(draw: random.Random, value: Any, world: World, package: str) -> str:
    """Signed by the right key, with a list of other files, or one that leaves some unsigned."""
    made = _statement(value)
    what = _listed(draw, made)
    _put(value, made)
    _sign(value, world, SIGNED[package])
    return f"signed by its owner: {what}"


def _listed(draw: random.Random, made: Any) -> str:
    """Changes what a statement says of the files; its root digest is computed again."""
    predicate = made["predicate"]
    resources, serialization = predicate["resources"], predicate["serialization"]
    one = draw.choice(resources)
    ignored = draw.choice((one["name"], "params", ".git", "."))
    kinds: dict[str, Callable[[], Any]] = {
        "a file less": lambda: resources.remove(one),
        "a file more": lambda: resources.append({**one, "name": "params/more"}),
        "a file twice": lambda: resources.append(dict(one)),
        "another name": lambda: one.update(name=draw.choice(mutations.NAMES)),
        "a path outside": lambda: one.update(name=f"../{one['name']}"),
        "a path with a dot": lambda: one.update(name=f"./{one['name']}"),
        "another digest": lambda: one.update(digest=hashlib.sha256(b"x").hexdigest()),
        "upper case": lambda: one.update(digest="AB" * 32),
        "a short digest": lambda: one.update(digest=one["digest"][:32]),
        "another algorithm": lambda: one.update(algorithm="blake3"),
        "ignored paths": lambda: serialization.update(ignore_paths=[ignored]),
        "ignored file": lambda: (
            resources.remove(one), serialization.update(ignore_paths=[one["name"]]),
        ),
        "shards": lambda: serialization.update(method="shards", shard_size=10),
        "links": lambda: serialization.update(allow_symlinks=True),
        "another hash": lambda: serialization.update(hash_type="blake2b"),
        "another predicate": lambda: made.update(predicateType="https://x.example"),
        "no file": resources.clear,
    }  # fmt: skip
    what = draw.choice(list(kinds))
    kinds[what]()
    digests = [entry["digest"] for entry in resources]
    root = hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()
    made["subject"][0]["digest"]["sha256"] = root
    return what


def mutate(draw: random.Random, value: Any) -> str:
    """Replaces, removes or adds one value somewhere in JSON."""
    places = list(_places(value))
    holder, key = draw.choice(places)
    what = draw.choice(("replaced", "replaced", "removed", "added"))
    before = json.dumps(value)
    if what == "removed":
        del holder[key]
    elif what == "added" and isinstance(holder, dict):
        holder[f"{key}2"] = draw.choice(mutations.VALUES)
    else:
        holder[key] = draw.choice(mutations.VALUES)
    return f"{key} {what}" + ", by the same" * (json.dumps(value) == before)


def _places(value: Any) -> Any:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _statement(value: Any) -> Any:
    return json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))


def _put(value: Any, made: Any) -> None:
    data = json.dumps(made).encode()
    value["dsseEnvelope"]["payload"] = base64.b64encode(data).decode()


def _sign(value: Any, world: World, name: str) -> None:
    payload = base64.b64decode(value["dsseEnvelope"]["payload"])
    encoded = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload
    signature = base64.b64encode(sign(world.key(name), encoded)).decode()
    value["dsseEnvelope"]["signatures"] = [{"sig": signature, "keyid": ""}]
    value["verificationMaterial"]["publicKey"]["hint"] = hint_of(world.public(name))
