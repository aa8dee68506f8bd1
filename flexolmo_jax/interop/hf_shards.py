"""Writes tensors as sharded safetensors, one tensor in memory at a time.

The library's own writer wants all tensors of a file in memory. The format is a header in JSON, then
the bytes of the tensors (https://huggingface.co/docs/safetensors).
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexolmo_jax.interop.hf_files import DTYPES, INDEX

SHARD_BYTES = 5 * 10**9
_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}


class ToWrite(NamedTuple):
    """A tensor that is read when it is written.

    Attributes:
      key: its name.
      shape, dtype: of what `read` returns.
      read: returns it; in any memory layout.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, tensors: Iterable[ToWrite], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes model-00001-of-N.safetensors and so on, and their index.

    Args:
      folder: exists; no such files are in it.
      tensors: in the order of the shards.
      shard_bytes: a shard is larger only if it is one tensor.
    """
    shards: list[list[ToWrite]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        places |= {tensor.key: name for tensor in shard}
    size = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, tensors: list[ToWrite]) -> None:
    # Wide numbers first, so that each tensor begins at a multiple of its item size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.key] = {
            "dtype": _NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read())  # a transposed view has other bytes
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), tensor.key
            opened.write(array.reshape(-1).view(np.uint8).data)
            del array  # before the next one is read
