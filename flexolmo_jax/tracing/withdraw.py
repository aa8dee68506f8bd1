"""Takes documents down: their text leaves the index, and no answer names them again."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from flexolmo_jax.data.groups import group_id
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.tracing.build import clean
from flexolmo_jax.tracing.index import Index, Shard
from flexolmo_jax.tracing.layout import DTYPES, LOCK, new_shard, read_index, write_index
from flexolmo_jax.tracing.shard_writer import finish
from flexolmo_jax.tracing.suffixes import SEPARATOR

_CHUNK = 2**22  # numbers at a time


class Withdrawn(NamedTuple):
    """How many documents were taken down, and how many tokens they had."""

    documents: int
    tokens: int


def withdraw(folder: Path, documents: Sequence[str] = (), groups: Sequence[str] = ()) -> Withdrawn:
    """Takes documents down, all of them in one step.

    The shards that hold them are written again without their tokens and records; other documents
    keep their numbers. Whoever has the index open keeps what was opened, until it is opened again.
    The digests of the texts stay, so that `--update` does not add them again.

    Args:
      folder: of the index.
      documents: ids; every document with such an id.
      groups: every document of these groups.

    Raises:
      ValueError: the index is damaged, or changed by another process now; or it has no document
        of an id or a group. Nothing is withdrawn then.
    """
    if not documents and not groups:
        raise ValueError("expected ids of documents (--document) or groups (--group), found none")
    if not all(groups):  # it would be the group of all documents that are of none
        raise ValueError("expected the name of a group, found an empty one")
    folder = Path(folder)
    read_index(folder)
    with locked(folder / LOCK, "is changing this index", "try again when it has ended", wait=10):
        index = read_index(folder)
        if index["unused"]:  # perhaps text that was withdrawn by a process that was killed then
            clean(folder, index)
        opened = Index.open(folder)
        found = _numbers(opened, documents, groups)
        _discard_unfinished(folder, index)
        replaced = {}
        for number in found:
            replaced[number] = new_shard(index)
            index["unused"].append(replaced[number])
        write_index(folder, index)
        for number, own in found.items():
            name = index["shards"][number]
            files = _rewrite(folder / name, folder / replaced[number], opened.shards[number], own)
            for kind in DTYPES:
                del index["files"][f"{name}/{kind}"]
            index["files"] |= files
        index["unused"] = [index["shards"][number] for number in found]
        index["shards"] = [replaced.get(n, name) for n, name in enumerate(index["shards"])]
        write_index(folder, index)  # from here on, they are withdrawn
        clean(folder, index)
    sizes = [opened.shards[n].size(own) for n, owns in found.items() for own in owns]
    return Withdrawn(len(sizes), sum(sizes))


def _numbers(index: Index, documents: Sequence[str], groups: Sequence[str]) -> dict[int, list[int]]:
    """{shard: numbers in it} of all documents that are asked for."""
    ids, names = set(documents), {group_id(group) or group for group in groups}
    missing = [("document", name) for name in ids], [("group", name) for name in names]
    left = {*missing[0], *missing[1]}
    found: dict[int, list[int]] = {}
    for number, shard in enumerate(index.shards):
        for own in range(len(shard.lines) - 1):
            record = shard.record(own)
            if record is None or not (record.id in ids or (record.group in names)):
                continue
            left -= {("document", record.id), ("group", record.group)}
            found.setdefault(number, []).append(own)
    if left:
        some = ", ".join(f"{kind} {name!r}" for kind, name in sorted(left)[:5])
        raise ValueError(
            f"{index.folder}: no {some}{' ...' if len(left) > 5 else ''} (or withdrawn before); "
            "nothing was withdrawn"
        )
    return found


def _discard_unfinished(folder: Path, index: dict[str, Any]) -> None:
    """Removes what an unfinished update has added: it may hold what must leave."""
    if index["building"]:
        index["unused"] += index["building"]["shards"]
        index["building"] = None
    clean(folder, index)


def _rewrite(old: Path, new: Path, shard: Shard, own: list[int]) -> dict[str, Any]:
    """Writes a shard without some of its documents; returns what `index.json` says of its files."""
    new.mkdir()
    starts, lines, tokens = shard.starts, shard.lines, shard.suffixes.tokens
    is_gone = np.zeros(len(tokens), bool)
    sizes = np.diff(lines)
    sizes[own] = 0
    counts = np.diff(shard.suffixes.buckets)
    for number in own:
        begin, end = int(starts[number]), int(starts[number + 1])
        is_gone[begin:end] = True
        counts -= np.bincount(tokens[begin : end - 1], minlength=len(counts))
    files: dict[str, BinaryIO] = {kind: open(new / kind, "wb") for kind in DTYPES}
    for start in range(0, len(tokens), _CHUNK):
        part = slice(start, start + _CHUNK)
        np.where(is_gone[part], np.uint32(SEPARATOR), tokens[part]).tofile(files["tokens"])
        places = shard.suffixes.order[part]
        places[~is_gone[places]].tofile(files["order"])
    for number in np.flatnonzero(sizes).tolist():
        files["records"].write(shard.records[lines[number] : lines[number + 1]].tobytes())
    counts.astype(DTYPES["counts"]).tofile(files["counts"])
    np.cumsum([0, *sizes], dtype=DTYPES["lines"]).tofile(files["lines"])
    for kind in ("starts", "digests"):
        shutil.copyfile(old / kind, new / kind)
    return finish(new, files)
