"""Ways to change a package, a merged model or a ledger: by accident, or on purpose."""

import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .sealing import array_of, data_file, manifest_of, put, seal

MANIFEST = "manifest.json"
NAMES = (
    "public", "Public", "PUBLIC", "pub1ic", "", " ", "code\n", "co de", "\x1b[31mred", "m\u0430th",
    "\uff4dath", "a/b", "..", "-x", "x" * 65, "\u202emath", "math\u200b", "MATH", "nu\x00ll",
)  # fmt: skip
VALUES = (
    None, True, False, -1, 0, 1, 3, 10**12, 2**70, 1.5, -1e308, "", "x", "0" * 64, "x" * 100_000,
    "Owner [/x] \x1b[2J", "a\u202eb", "bfloat17", "../..", "/", "/dev/zero", "/proc/self/fd/0",
    [], {}, [1, "a", None], {"a": {"b": []}}, [[]] * 3,
)  # fmt: skip


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def folders_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())


# To the files. Each takes (random, folder) and says what it did.


def flip(draw: random.Random, folder: Path) -> str:
    file = draw.choice(files_of(folder))
    content = bytearray(file.read_bytes() or b"x")
    for _ in range(draw.choice((1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"bits flipped in {file.name}"


def cut(draw: random.Random, folder: Path) -> str:
    file = draw.choice(files_of(folder))
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content) + 1)])
    return f"{file.name} cut"


def grow(draw: random.Random, folder: Path) -> str:
    file = draw.choice(files_of(folder))
    more = draw.choice((b"\n", b" ", b"\0" * 20, draw.randbytes(4096)))
    content = file.read_bytes()
    file.write_bytes(draw.choice((content + more, more + content)))
    return f"{file.name} grown"


def delete(draw: random.Random, folder: Path) -> str:
    file = draw.choice(files_of(folder))
    file.unlink()
    return f"{file.name} deleted"


def swap(draw: random.Random, folder: Path) -> str:
    one, other = (draw.choice(files_of(folder)) for _ in range(2))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second), other.write_bytes(first)
    return f"{one.parent.name}/{one.name} and {other.parent.name}/{other.name} swapped"


def carriage_returns(draw: random.Random, folder: Path) -> str:
    file = draw.choice([p for p in files_of(folder) if p.suffix in (".json", ".jsonl")])
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    return f"{file.name} with CRLF"


def stray(draw: random.Random, folder: Path) -> str:
    name = draw.choice(("notes.txt", ".hidden", "x.partial", f".{MANIFEST}.{'0' * 32}.partial",
                        f".{MANIFEST}.x.partial", "params/extra", "params/state/more/c/0",
                        "params/state/.zarr", "\x1b[2J", "a\nb"))  # fmt: skip
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(draw.randbytes(8))
    return f"stray {name!r}"


def link_to_file(draw: random.Random, folder: Path) -> str:
    file = draw.choice(files_of(folder))
    moved = folder.parent / f"{folder.name}.{file.name}.moved"
    shutil.move(file, moved)
    file.symlink_to(draw.choice((moved, Path(os.path.relpath(moved, file.parent)))))
    return f"{file.name} is a link"


def link_to_folder(draw: random.Random, folder: Path) -> str:
    if not (below := folders_of(folder)):
        (folder / "more").symlink_to(folder.parent)
        return "a link to the folder above"
    one = draw.choice(below)
    moved = folder.parent / f"{folder.name}.{one.name}.moved"
    shutil.move(one, moved)
    one.symlink_to(moved)
    return f"the folder {one.name} is a link"


def stray_link(draw: random.Random, folder: Path) -> str:
    where = draw.choice([folder, *folders_of(folder)])
    to = draw.choice((folder, folder.parent, "/", "/dev/zero", "nowhere", "self"))
    (where / draw.choice(("self", "more", "1"))).symlink_to(to)
    return f"a stray link to {to}" if where == folder else f"a stray link in {where.name}"


def special(draw: random.Random, folder: Path) -> str:
    instead = draw.random() < 0.5
    where = draw.choice([folder, *folders_of(folder)])
    path = draw.choice(files_of(folder)) if instead else where / "pipe"
    path.unlink(missing_ok=True)
    kind = draw.choice(("pipe", "socket", "folder"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            before = os.getcwd()
            os.chdir(path.parent)  # the name of a socket is at most 107 bytes
            try:
                made.bind(path.name)
            finally:
                os.chdir(before)
    return f"a {kind} at {path.name}"


FILES = (flip, cut, grow, delete, swap, carriage_returns, stray, link_to_file, link_to_folder,
         stray_link, special)  # fmt: skip


# To what is in them; always sealed again.


def weights(draw: random.Random, folder: Path) -> str:
    name = draw.choice(sorted(manifest_of(folder)["tensors"]))
    array = array_of(folder, name)
    flat, at = array.reshape(-1), draw.randrange(array.size)
    what = draw.choice(("nan", "inf", "-inf", "3e38", "noise", "zero", "reversed", "one", "large"))
    if what in ("nan", "inf", "-inf", "3e38"):
        flat[at] = np.float32(what)
    elif what == "noise":
        flat += np.random.default_rng(draw.randrange(2**32)).normal(0, 0.1, flat.shape)
    elif what == "large":
        flat *= draw.choice((100, 1e6, 1e20))
    else:
        flat[:] = {"zero": 0 * flat, "reversed": flat[::-1].copy(), "one": 0 * flat + 1}[what]
    put(folder, name, array)
    return f"{name}: {what}"


def described_otherwise(draw: random.Random, folder: Path) -> str:
    """What the manifest says of a tensor."""
    tensors = manifest_of(folder)["tensors"]
    name = draw.choice(sorted(tensors))
    entry, shape = tensors[name], tensors[name]["shape"]
    changes: list[tuple[str, Any]] = [
        ("shape", shape[::-1]), ("shape", [10**9] * len(shape)), ("shape", [2**62]), ("shape", []),
        ("shape", [1.0 * x for x in shape]), ("shape", "12"), ("shape", [-x for x in shape]),
        ("shape", [*shape, 1]), ("shape", [[x] for x in shape]), ("dtype", "float64"),
        ("dtype", "int32"), ("dtype", "bfloat16"), ("dtype", "object"), ("dtype", "S1000000000"),
        ("dtype", "<f4"), ("dtype", "float16"), ("dtype", None), ("sha256", "0" * 64),
        ("sha256", None), ("more", 1),
    ]  # fmt: skip
    key, value = draw.choice(changes)
    what = draw.choice(("changed", "changed", "changed", "removed", "renamed", "added"))
    if what == "changed":
        entry[key] = value
    elif what == "added":
        tensors["router.more"] = entry
    else:
        del tensors[name]
        if what == "renamed":
            tensors[f"{name}.x"] = entry
    seal(folder, contents=False, tensors=tensors)
    return f"{name} of the manifest {what}" + f": {key}" * (what == "changed")


def data_otherwise(draw: random.Random, folder: Path) -> str:
    """The file of a tensor: cut, grown or moved, sealed again."""
    name = draw.choice(sorted(manifest_of(folder)["tensors"]))
    file = data_file(folder, name)
    content = file.read_bytes()
    what = draw.choice(("abc", "empty", "half", "twice", "index", "moved", "before", "removed"))
    made = {
        "abc": b"abc", "empty": b"", "half": content[: len(content) // 2], "twice": content * 2,
        "index": content[:-20] + draw.randbytes(20), "before": content[-20:] + content[:-20],
    }  # fmt: skip
    if what in made:
        file.write_bytes(made[what])
        seal(folder)
    else:
        if what == "moved":
            shutil.move(file, file.with_name("1"))
        else:
            file.unlink()
        files = manifest_of(folder)["files"]
        del files[str(file.relative_to(folder))]
        _seal_fields(folder, {**manifest_of(folder), "files": files})
    return f"bytes of {name}: {what}"


def zarr_otherwise(draw: random.Random, folder: Path) -> str:
    """What Zarr's own description says of a tensor."""
    name = draw.choice(sorted(manifest_of(folder)["tensors"]))
    file = folder / "params/state" / name / "zarr.json"
    text = _changed_json(draw, json.loads(file.read_bytes()))
    file.write_text(text)
    seal(folder)
    return f"zarr.json of {name} changed"


def field(draw: random.Random, folder: Path) -> str:
    """A value of the manifest, of another type, or none."""
    manifest = manifest_of(folder)
    where = _change(draw, manifest)
    _seal_fields(folder, manifest)
    return f"field {where}"


def name(draw: random.Random, folder: Path) -> str:
    found = draw.choice(NAMES)
    seal(folder, contents=False, name=found)
    return f"name {found!r}"


def raw(draw: random.Random, folder: Path) -> str:
    """A manifest that is no plain JSON object."""
    file = folder / MANIFEST
    text = file.read_text(encoding="utf-8")
    deep = 10 ** draw.randrange(2, 6)
    what, made = draw.choice(
        [
            ("a key twice", text.replace('"kind"', '"kind": "expert",\n "kind"', 1)),
            ("NaN", re.sub(r'"format": 2', '"format": NaN', text)),
            ("Infinity", re.sub(r'"format": 2', '"format": 1e999', text)),
            ("a huge number", re.sub(r'"format": 2', '"format": ' + "9" * 10_000, text)),
            ("deep lists", text.replace('"format": 2', f'"x": {"[" * deep}{"]" * deep}')),
            ("deep objects", '{"a":' * deep + "1" + "}" * deep),
            ("no object", draw.choice(("[]", "3", "null", '"x"', "", "{", "true"))),
            ("a byte order mark", "\ufeff" + text),
            ("spaces", " " + text),
            ("16 MiB", text[:-3] + " " * 2**24 + text[-3:]),
            ("zero bytes", "\0" * len(text)),
        ]
    )
    file.write_text(made, encoding="utf-8")
    return f"manifest: {what}"


CONTENT = (weights, weights, described_otherwise, data_otherwise, zarr_otherwise, field, field,
           name, raw)  # fmt: skip


def entries(draw: random.Random, folder: Path) -> str:
    """The entries of a merged model."""
    manifest = manifest_of(folder)
    experts, anchor = manifest["experts"], manifest["anchor"]
    what = draw.choice(("labels", "paths", "digests", "twice", "renamed", "path", "anchor", "pin"))
    if what in ("labels", "paths", "digests"):
        key = {"labels": "name", "paths": "path", "digests": "digest"}[what]
        experts[0][key], experts[1][key] = experts[1][key], experts[0][key]
    elif what == "twice":
        experts.append(dict(experts[0]))
    elif what == "renamed":
        experts[0]["name"] = draw.choice((*NAMES, experts[1]["name"].upper(), "other"))
    elif what == "path":
        experts[0]["path"] = draw.choice(
            ("/", "/dev/zero", "/proc/self", "", ".", "\0", "../merged")
        )
    elif what == "anchor":
        anchor["path"] = draw.choice(("/", "/dev/zero", "", "../experts/code", "../other_anchor"))
    else:
        anchor[draw.choice(("digest", "identity"))] = draw.choice(("0" * 64, "", None, 3))
    _seal_fields(folder, manifest)
    return f"entries: {what}"


def ledger(draw: random.Random, file: Path) -> str:
    """A ledger, changed as text or as values."""
    content = file.read_bytes()
    what = draw.choice(("flip", "cut", "grow", "value", "value", "value", "raw"))
    if what == "value":
        file.write_text(_changed_json(draw, json.loads(content)))
    elif what == "raw":
        deep = 10 ** draw.randrange(2, 6)
        file.write_text(draw.choice(("[]", "3", "", "null", "[" * deep, '{"runs": NaN}')))
    elif what == "flip":
        at = draw.randrange(len(content))
        file.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        )
    else:
        file.write_bytes(content[: draw.randrange(len(content))] if what == "cut" else content * 2)
    return f"ledger: {what}"


def _seal_fields(folder: Path, manifest: dict[str, Any]) -> None:
    """Seals a manifest as it is given, with whatever is in it."""
    (folder / MANIFEST).write_text(json.dumps(manifest))
    seal(folder, contents=False)


def _changed_json(draw: random.Random, value: Any) -> str:
    _change(draw, value)
    return json.dumps(value)


def _change(draw: random.Random, value: Any) -> str:
    """Changes a part of a JSON value, at any depth; says where."""
    places = list(_places(value))
    holder, key, where = draw.choice(places)
    if draw.random() < 0.15:
        del holder[key]
        return f"{where} removed"
    if draw.random() < 0.1 and isinstance(holder, dict):
        holder[draw.choice(("more", "\x1b[0m", "", "__class__"))] = holder[key]
        return f"{where} doubled"
    holder[key] = draw.choice(VALUES)
    return f"{where} = {holder[key]!r:.40}"


def _places(value: Any, where: str = "") -> Any:
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(parts):
        here = f"{where}.{key}".lstrip(".")
        yield value, key, here
        if isinstance(part, dict | list):
            yield from _places(part, here)


Mutation = Callable[[random.Random, Path], str]
