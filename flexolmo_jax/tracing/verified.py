"""Opening an index's files: exactly those that `index.json` lists, with exactly those bytes.

A cut or changed suffix array would answer wrongly without any error, so nothing is read from an
index before all of it has been hashed.
"""

import concurrent.futures
import hashlib
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.storage.files import is_partial
from flexolmo_jax.storage.regular_files import list_files, open_regular
from flexolmo_jax.tracing.layout import DTYPES, INDEX, LOCK, TOKENIZER, read_index

Maps = dict[str, mmap.mmap | bytes]
PATIENCE = 10.0  # seconds to try again while another process changes the index


def open_files(folder: Path) -> tuple[dict[str, Any], Maps]:
    """Hashes every file of an index, and maps it into memory.

    Another process may change the index meanwhile: then it is opened as it is afterwards. What is
    mapped stays as it was, since no file is ever written again.

    Returns:
      the content of `index.json`, and the files by name.

    Raises:
      ValueError: there is no complete index; or a file is missing, unexpected, or not the listed
        one; names it.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        about = read_index(folder)
        if not about["shards"]:
            raise ValueError(
                f"{folder}: half-built: no shard of it is usable yet; run `flexolmo trace index` "
                "again with the same arguments, which continues it"
            )
        try:
            maps = _verified(folder, about)
            _check_shapes(folder, about, maps)
            return about, maps
        except (ValueError, FileNotFoundError) as error:
            # A lock or a partial file may vanish while the folder is listed.
            is_changed = isinstance(error, FileNotFoundError)
            is_changed = is_changed or read_index(folder)["digest"] != about["digest"]
            if not is_changed or time.monotonic() > deadline:
                raise


def array(maps: Maps, shard: str, kind: str) -> np.ndarray:
    """A file of a shard as an array that cannot be written."""
    return np.frombuffer(maps[f"{shard}/{kind}"], DTYPES[kind])


def _verified(folder: Path, about: dict[str, Any]) -> Maps:
    files = about["files"]
    building = (about["building"] or {"shards": []})["shards"]
    found = {
        name
        for name in list_files(folder, ignored=[*about["unused"], *building])
        if name not in (INDEX, LOCK) and not is_partial(name, of=INDEX)
    }
    for name in sorted(found ^ files.keys()):
        what = "unexpected file; delete it" if name in found else "missing; index again"
        raise ValueError(f"{folder / name}: {what}")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        largest_first = sorted(files, key=lambda name: -files[name]["bytes"])
        maps = pool.map(lambda name: _map(folder / name, files[name]), largest_first)
        return dict(zip(largest_first, maps, strict=True))


def _map(file: Path, expected: dict[str, Any]) -> mmap.mmap | bytes:
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size != expected["bytes"]:
            raise ValueError(
                f"{file}: damaged: expected {expected['bytes']:,} bytes, found {size:,}; restore "
                "it, or index again"
            )
        found = hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]
        if found != expected["sha256"]:
            raise ValueError(
                f"{file}: not the file that was indexed: expected sha256 "
                f"{expected['sha256'][:12]}..., found {found[:12]}...; restore it, or index again"
            )
        return mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) if size else b""


def _check_shapes(folder: Path, about: dict[str, Any], maps: Maps) -> None:
    """Raises ValueError if files do not belong to each other, although each is as it was listed."""
    if hashlib.sha256(maps[TOKENIZER]).hexdigest() != about["tokenizer"]:
        raise ValueError(
            f"{folder / TOKENIZER}: another tokenizer than that of the index: expected sha256 "
            f"{about['tokenizer'][:12]}..."
        )
    for shard in about["shards"]:
        sizes = {}
        for kind, dtype in DTYPES.items():
            sizes[kind], rest = divmod(len(maps[f"{shard}/{kind}"]), dtype.itemsize)
            if rest:
                raise ValueError(f"{folder / shard / kind}: damaged: it ends within a number")
        counts, starts, lines = (array(maps, shard, kind) for kind in ("counts", "starts", "lines"))
        agrees = (
            sizes["counts"] == about["vocabulary_size"]
            and sizes["order"] == counts.sum()
            and sizes["starts"] == sizes["lines"] == sizes["digests"] + 1
            and starts[0] == lines[0] == 0
            and starts[-1] == sizes["tokens"]
            and lines[-1] == sizes["records"]
            and bool((np.diff(starts) > 0).all() and (np.diff(lines) >= 0).all())
        )
        if not agrees:
            raise ValueError(f"{folder / shard}: damaged: its files do not belong together")
