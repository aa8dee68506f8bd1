"""The files of a package: regular ones only, each listed, and every byte checked in one pass."""

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from flexolmo_jax.storage.regular_files import open_regular
from flexolmo_jax.storage.tensors import UNFIT, in_range

CHUNK = 2**20  # bytes of a file that a thread holds at a time


class Expected(NamedTuple):
    """A file, and what must be in it.

    Attributes:
      file: where it is.
      name: its name in errors.
      sha256: of all its bytes.
      tensor: of a file that begins with a tensor: bytes of the tensor, its dtype, and its sha256.
    """

    file: Path
    name: str
    sha256: str
    tensor: tuple[int, str, str] | None = None


def check_listed(folder: Path, listed: Collection[str], found: Collection[str]) -> None:
    """Raises ValueError, naming the file, if a listed file is missing or an unlisted one exists."""
    for name in sorted({*listed, *found}):
        where = f"{folder / name}{tensor_of(name)}"
        if name not in found:
            raise ValueError(f"{where}: missing from the package; get it again from its owner")
        if name not in listed:
            raise ValueError(f"{where}: unexpected file; delete it")


def tensor_of(name: str) -> str:
    """Words that name the tensor that a file of a package belongs to; empty if none."""
    match = re.match(r"params/state/([^/]+)/", name)
    return f" (tensor {match[1]})" if match and match[1] != "array_metadatas" else ""


def check_bytes(files: Iterable[Expected], share: tuple[int, int] = (0, 1)) -> None:
    """Reads files once: compares the digests, of tensors too, and refuses weights not in range.

    Args:
      files: the files.
      share: (k, n) checks only the k-th of n roughly equal shares of the bytes, so that n processes
        can divide the work.

    Raises:
      ValueError: names the first file that was changed, or holds such weights.
    """
    index, count = share
    own = sorted(files, key=lambda expected: -os.lstat(expected.file).st_size)[index::count]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(_check_file, own):
            pass


def _check_file(expected: Expected) -> None:
    whole, own, unfit = hashlib.sha256(), "", False
    count, dtype, tensor = expected.tensor or (0, "", "")
    with open_regular(expected.file) as opened:
        for size in (count, None):  # the tensor's bytes, and the rest of the file
            for chunk in _chunks(opened, size):
                whole.update(chunk)
                if size and not unfit:
                    unfit = not in_range(chunk, dtype)
            own = own or whole.copy().hexdigest()
    if whole.hexdigest() != expected.sha256:
        raise ValueError(
            f"{expected.name}: changed after the package was written (expected sha256 "
            f"{expected.sha256[:12]}..., found {whole.hexdigest()[:12]}...); get it again from its "
            "owner"
        )
    if tensor and own != tensor:
        raise ValueError(
            f"{expected.name}: not the tensor of the manifest (expected sha256 {tensor[:12]}..., "
            f"found {own[:12]}...); get the package again from its owner"
        )
    if unfit:
        raise ValueError(f"{expected.name}: {UNFIT}; ask the package's owner for a sound one")


def _chunks(opened: BinaryIO, count: int | None) -> Iterator[memoryview]:
    """The next `count` bytes, or all that are left; no chunk ends within a number."""
    memory = memoryview(bytearray(CHUNK if count is None else min(CHUNK, count)))
    while count is None or count > 0:
        wanted = len(memory) if count is None else min(len(memory), count)
        filled = 0
        while filled < wanted and (got := opened.readinto(memory[filled:wanted])):  # type: ignore
            filled += got
        if not filled:
            return
        yield memory[:filled]
        if count is not None:
            count -= filled
