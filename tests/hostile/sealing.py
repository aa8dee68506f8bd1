"""What anyone can do with a package of somebody else: change it, and recompute all digests."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np


def manifest_of(package: Path) -> dict[str, Any]:
    return json.loads((package / "manifest.json").read_bytes())


def data_file(package: Path, tensor: str) -> Path:
    """The file with the bytes of a tensor, and an index of 20 bytes after them."""
    (file,) = (p for p in (package / "params/state" / tensor / "c").rglob("*") if p.is_file())
    return file


def array_of(package: Path, tensor: str) -> np.ndarray:
    entry = manifest_of(package)["tensors"][tensor]
    data = data_file(package, tensor).read_bytes()[:-20]
    return np.frombuffer(data, entry["dtype"]).reshape(entry["shape"]).copy()


def put(package: Path, tensor: str, array: np.ndarray) -> None:
    """Replaces a tensor, and seals the package."""
    file = data_file(package, tensor)
    file.write_bytes(np.ascontiguousarray(array).tobytes() + file.read_bytes()[-20:])
    seal(package)


def seal(package: Path, /, *, contents: bool = True, **changes: Any) -> None:
    """Recomputes the digests of tensors, of files and of the manifest.

    Args:
      package: the folder.
      contents: False leaves what the manifest says of files and tensors.
      changes: fields of the manifest to replace.
    """
    made = {**manifest_of(package), **changes}
    made.pop("digest", None)
    if contents:
        for name, entry in made.get("tensors", {}).items():
            data = data_file(package, name).read_bytes()[:-20]
            entry["sha256"] = hashlib.sha256(data).hexdigest()
        found = (Path(folder) / name for folder, _, names in os.walk(package) for name in names)
        made["files"] = {
            str(p.relative_to(package)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(found)
            if p != package / "manifest.json" and p.is_file()
        }
    text = json.dumps(made, sort_keys=True, separators=(",", ":"))
    made["digest"] = hashlib.sha256(text.encode()).hexdigest()
    text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    (package / "manifest.json").write_text(text, encoding="utf-8", newline="")
