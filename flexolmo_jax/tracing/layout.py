"""The files of an index, and its `index.json`, which lists and seals them.

    index.json         owner, digest of the tokenizer, shards; bytes and sha256 of every other file
    tokenizer.json
    00000/             a shard
      tokens           uint32: its documents' ids, a separator behind each
      order            int32: the suffix array
      counts           int64 [V]: how often each id occurs
      starts           int64: of each document, its first token
      digests          32 bytes for each document: sha256 of its text
      records          JSON: what is known of each document; nothing of a withdrawn one
      lines            int64: where each record begins and ends

All numbers are little-endian. `index.json` alone says what belongs to an index: whoever changes one
writes a new shard first, then `index.json` in one rename, and then removes the old shard; `unused`
names the shard that is not written completely, or not removed yet.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.storage.files import canonical_digest, file_digest, replace_file

INDEX = "index.json"
TOKENIZER = "tokenizer.json"
LOCK = ".lock"
FORMAT = 1
DTYPES: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<u4"),
    "order": np.dtype("<i4"),
    "counts": np.dtype("<i8"),
    "starts": np.dtype("<i8"),
    "digests": np.dtype("V32"),
    "records": np.dtype("u1"),
    "lines": np.dtype("<i8"),
}
FIELDS = ("id", "group", "source", "licence", "where")  # of a record


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Seals and writes `index.json`, in one rename."""
    content = {key: value for key, value in index.items() if key != "digest"}
    sealed = {**content, "digest": canonical_digest(content)}
    replace_file(folder / INDEX, json.dumps(sealed, indent=1, ensure_ascii=False) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """Reads `index.json`, and checks its seal and the types of its fields.

    Raises:
      ValueError: there is none, it was changed, or it is of another format.
    """
    file = folder / INDEX
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected an index of `flexolmo trace index`, found no folder")
    if file.is_symlink() or not file.is_file():
        raise ValueError(
            f"{folder}: expected an index of `flexolmo trace index`, found no {INDEX}; if it was "
            "interrupted, run it again"
        )
    try:
        index = json.loads(file.read_bytes())
        content = {key: value for key, value in index.items() if key != "digest"}
        is_sealed = index["digest"] == canonical_digest(content)
        version = index["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: damaged, no description of an index ({error!r})") from error
    if not is_sealed:
        raise ValueError(f"{file}: damaged: its digest is not that of its content; index again")
    if version != FORMAT:
        raise ValueError(
            f"{file}: expected format {FORMAT}, found {version!r:.40}; index again, or use the "
            "version of flexolmo_jax that made it"
        )
    return index


def entry(file: Path) -> dict[str, Any]:
    """What `index.json` says of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}
