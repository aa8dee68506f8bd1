"""The files of an index, and its `index.json`, which lists and seals them.

    index.json         owner, digest of the tokenizer, shards; bytes and sha256 of every other file
    tokenizer.json
    00000/             a shard
      tokens           uint32: the ids of its documents, a separator behind each
      order            int32: the suffix array
      counts           int64 [V]: how often each id occurs
      starts           int64: where each document begins in `tokens`, and where the last one ends
      digests          32 bytes for each document: sha256 of its text
      records          JSON: what is known of each document; nothing of a withdrawn one
      lines            int64: where each record begins in `records`, and where the last one ends

All numbers are little-endian. `index.json` alone says what belongs to an index. Whoever changes an
index writes a new shard, then `index.json` in one rename, and then removes the old shard. Until all
is done, `unused` names the folders that do not belong to the index (yet, or any more), so that an
index stays usable whenever its writer is killed.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from flexolmo_jax.storage.files import canonical_digest, file_digest, replace_file
from flexolmo_jax.storage.regular_files import open_regular
from flexolmo_jax.tracing.suffixes import HIGHEST

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
_SHARD = re.compile(r"[0-9]{5,9}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Seals and writes `index.json`, in one rename."""
    replace_file(folder / INDEX, _sealed(index))


def _sealed(index: dict[str, Any]) -> str:
    content = {key: value for key, value in index.items() if key != "digest"}
    sealed = {**content, "digest": canonical_digest(content)}
    return json.dumps(sealed, indent=1) + "\n"


def read_index(folder: Path) -> dict[str, Any]:
    """Reads `index.json`; checks its seal, and the form of its fields.

    Raises:
      ValueError: there is none, it was changed, or it is of another format.
    """
    file = folder / INDEX
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected an index of `flexolmo trace index`, found no folder")
    try:
        with open_regular(file) as opened:
            data = opened.read()
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: expected an index of `flexolmo trace index`, found no {INDEX} there"
        ) from None
    try:
        index = json.loads(data)
        is_sealed = _sealed(index).encode() == data
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: damaged, no description of an index ({error})") from error
    if not is_sealed:
        raise ValueError(
            f"{file}: damaged: its digest is not that of its content; restore it, or index again"
        )
    if index.get("format") != FORMAT:
        raise ValueError(
            f"{file}: expected format {FORMAT}, found {index.get('format')!r:.40}; index again, or "
            "use the version of flexolmo_jax that made it"
        )
    if wrong := _wrong_field(index):
        raise ValueError(f"{file}: damaged: {wrong!r} is not what an index has there")
    return index


def _wrong_field(index: dict[str, Any]) -> str | None:
    """The first field that is missing or of a wrong form."""

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(name, str) and _SHARD.fullmatch(name) for name in value
        )

    def entries(files: Any, shards: list[str], *others: str) -> bool:
        expected = {*others, *(f"{shard}/{kind}" for shard in shards for kind in DTYPES)}
        is_complete = isinstance(files, dict) and files.keys() == expected
        return is_complete and all(map(_is_entry, files.values()))

    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 0

    def is_digest(value: Any) -> bool:
        return isinstance(value, str) and _DIGEST.fullmatch(value) is not None

    shards, building = index.get("shards"), index.get("building")
    is_right = {
        "owner": isinstance(index.get("owner"), str),
        "tokenizer": is_digest(index.get("tokenizer")),
        "vocabulary_size": is_count(index.get("vocabulary_size")),
        "shards": names(shards) and len(set(shards or ())) == len(shards or ()),
        "unused": names(index.get("unused")),
    }
    is_right["files"] = is_right["shards"] and entries(index.get("files"), shards or [], TOKENIZER)
    is_right["building"] = building is None or (
        isinstance(building, dict)
        and is_digest(building.get("of"))
        and is_count(building.get("documents"))
        and names(building.get("shards"))
        and entries(building.get("files"), building["shards"])
    )
    return next((name for name, right in is_right.items() if not right), None)


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"bytes", "sha256"}
        and type(value["bytes"]) is int
        and isinstance(value["sha256"], str)
    )


def entry(file: Path) -> dict[str, Any]:
    """What `index.json` says of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def new_shard(index: dict[str, Any]) -> str:
    """A name that no shard has, or had when the index was last written."""
    building = index["building"] or {"shards": []}
    used = [*index["shards"], *index["unused"], *building["shards"]]
    return f"{1 + max(map(int, used), default=-1):05d}"


def digests(folder: Path, shards: list[str]) -> Iterator[bytes]:
    """The sha256 of every document's text, of withdrawn ones too."""
    for shard in shards:
        for digest in np.fromfile(folder / shard / "digests", DTYPES["digests"]):
            yield digest.tobytes()


def read_tokenizer(text: str, where: object) -> tuple[tokenizers.Tokenizer, int, str]:
    """The tokenizer of a tokenizer.json, which is used for text only, never for control tokens.

    Returns:
      it; how many ids it has; and the sha256 of `text`.

    Raises:
      ValueError: it is none, or has more ids than can be sorted.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{where}: not a tokenizer.json ({error})") from error
    tokenizer.encode_special_tokens = True
    vocabulary = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if vocabulary > HIGHEST + 1:
        raise ValueError(f"{where}: expected ids up to {HIGHEST:,}, found {vocabulary - 1:,}")
    return tokenizer, vocabulary, hashlib.sha256(text.encode()).hexdigest()
