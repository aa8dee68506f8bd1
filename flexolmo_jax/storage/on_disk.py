"""Tensors that stay in the files that `tensors.save` wrote until a part of them is read."""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np


def open_tensors(path: Path, tensors: dict[str, Any]) -> dict[str, "OnDisk"]:
    """The tensors of a folder that `save` wrote, left in their files.

    Only the slices that are used are read, when they are used: a device's shard of a matrix does
    not bring the rest of it into memory.

    Args:
      path: the folder.
      tensors: {name: anything with a shape and a dtype}.

    Raises:
      ValueError: a tensor is missing, in another format, or of another shape or dtype.
    """
    return {name: _find(path / "state" / name, name, x) for name, x in tensors.items()}


_LITTLE = [{"name": "bytes", "configuration": {"endian": "little"}}]
_INDEX = 20  # bytes after the array: where it begins, how long it is, and a checksum of these two


def _find(folder: Path, name: str, like: Any) -> "OnDisk":
    """Zarr 3 as `save` has Orbax write it: the bytes of the array, then an index of one entry.

    The offset and size of the bytes follow from shape and dtype. The file's own description must
    agree, so that other readers of Zarr see the same numbers.
    """
    file, shape, dtype = folder / "zarr.json", list(like.shape), jnp.dtype(like.dtype)
    if not file.is_file():
        raise ValueError(f"{folder}: the tensor {name} {shape} is missing")
    try:
        about = json.loads(file.read_bytes())
        (codec,) = about["codecs"]
        shard = codec["configuration"]
        keys = about["chunk_key_encoding"]
        shapes = (
            about["shape"],
            about["chunk_grid"]["configuration"]["chunk_shape"],
            shard["chunk_shape"],
        )
        form = (
            *(about["data_type"], shard["codecs"], shard["index_codecs"][:1]),
            *(shard.get("index_location", "end"), keys["name"]),
            keys.get("configuration", {}).get("separator", "/"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file}: {name}: damaged, not a description of Zarr ({error!r})"
        ) from error
    if shapes[0] != shape:
        raise ValueError(f"{file}: {name}: expected shape {shape}, found {shapes[0]!r:.200}")
    own = _LITTLE if dtype.itemsize > 1 else [{"name": "bytes"}]  # a byte has no order
    expected = (dtype.name, own, _LITTLE, "end", "default", "/")
    if shapes != (shape, shape, shape) or form != expected:
        raise ValueError(
            f"{file}: {name}: expected {dtype.name} in one uncompressed file, found {about!r:.300}"
        )
    data, count = folder.joinpath("c", *("0" for _ in shape)), dtype.itemsize * math.prod(shape)
    if not data.is_file():
        raise ValueError(f"{data}: {name}: the file with its bytes is missing")
    if data.stat().st_size != count + _INDEX:
        raise ValueError(
            f"{data}: {name}: expected {count} bytes and {_INDEX} of an index, found "
            f"{data.stat().st_size} in all"
        )
    with open(data, "rb") as opened:
        opened.seek(count)
        place = np.frombuffer(opened.read(16), "<u8").tolist()
    if place != [0, count]:
        raise ValueError(f"{data}: {name}: expected an index of 0 and {count}, found {place}")
    return OnDisk(data, 0, dtype, tuple(shape))


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """An array in a file, read in slices; `placement.device_put` accepts it."""

    file: Path
    offset: int  # of its first byte
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        ranges = ranges_of(part, self.shape)
        out = page_aligned(tuple(map(len, ranges)), self.dtype)
        self.read(ranges, out)
        return out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[(slice(None),) * self.ndim], dtype)

    def read(self, ranges: tuple[range, ...], out: np.ndarray) -> None:
        """Reads a slice directly into `out`, of the same shape.

        Raises:
          ValueError: the file ends too early.
        """
        if not out.size:
            return
        # A run spans as many trailing axes as are contiguous both in the file and in `out`.
        first = self.ndim - 1
        while (
            first and ranges[first] == range(self.shape[first])
            and out[(0,) * (first - 1)].flags.c_contiguous
        ):  # fmt: skip
            first -= 1
        stride = math.prod(self.shape[first + 1 :])
        if len(ranges[first]) * stride * self.dtype.itemsize < SMALL_RUN:
            stored = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
            out[...] = stored[tuple(slice(r.start, r.stop) for r in ranges)]
            return
        with open(self.file, "rb", buffering=0) as opened:
            for index in np.ndindex(out.shape[:first]):
                at = 0
                for axis, number in enumerate(index):
                    at = at * self.shape[axis] + ranges[axis][number]
                at = (at * self.shape[first] + ranges[first].start) * stride
                opened.seek(self.offset + at * self.dtype.itemsize)
                left = out[index].reshape(-1).view(np.uint8).data
                while left:
                    count = opened.readinto(left)
                    if not count:
                        raise ValueError(f"{self.file}: it ends too early")
                    left = left[count:]


SMALL_RUN = 65_536  # bytes; for shorter runs, a system call each is slower than a memory map


@dataclasses.dataclass(frozen=True)
class Joined:
    """Arrays [L, E_i, ...] concatenated along axis 1, read in slices as `OnDisk` is.

    Different dtypes are promoted: trained experts are float32 beside an anchor in half precision.
    """

    arrays: tuple[Any, ...]  # OnDisk, or of NumPy or JAX
    padding: int = 0  # further experts after them, filled with `fill`
    fill: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        layers, _, *rest = self.arrays[0].shape
        return (layers, sum(x.shape[1] for x in self.arrays) + self.padding, *rest)

    @property
    def ndim(self) -> int:
        return self.arrays[0].ndim

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(jnp.result_type(*(x.dtype for x in self.arrays)))

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        layers, wanted, *rest = ranges_of(part, self.shape)
        out = page_aligned((len(layers), len(wanted), *map(len, rest)), self.dtype)
        first = done = 0  # experts before this array; in `out` already
        with concurrent.futures.ThreadPoolExecutor() as pool:  # most of the time, pages are made
            reads = []
            for x in self.arrays:
                here = range(max(wanted.start, first), min(wanted.stop, first + x.shape[1]))
                if here:
                    own = range(here.start - first, here.stop - first)
                    into, ranges = out[:, done : done + len(here)], (layers, own, *rest)
                    reads.append(pool.submit(_read, x, ranges, into))
                    done += len(here)
                first += x.shape[1]
            for read in reads:
                read.result()
        out[:, done:] = self.fill
        return out


def _read(x: Any, ranges: tuple[range, ...], into: np.ndarray) -> None:
    """A slice of any array into memory of its shape."""
    if isinstance(x, OnDisk) and x.dtype == into.dtype:
        x.read(ranges, into)
    else:
        into[...] = x[tuple(slice(r.start, r.stop) for r in ranges)]


@dataclasses.dataclass(frozen=True)
class WithDelta:
    """base + a b, of arrays [L, E, I, O], [L, E, I, R] and [L, E, R, O]; read in slices.

    Computed in float32 when a slice is read, so that memory never holds more than that slice.
    """

    base: Any  # OnDisk, or of NumPy or JAX, as are a and b
    a: Any
    b: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        layers, experts, rows, columns = part
        out = np.array(self.base[part], np.float32)
        a = np.asarray(self.a[layers, experts, rows, :], np.float32)
        b = np.asarray(self.b[layers, experts, :, columns], np.float32)
        for index in np.ndindex(out.shape[:2]):  # one matrix at a time: no second array of its size
            out[index] += a[index] @ b[index]
        return out


@dataclasses.dataclass(frozen=True)
class Widened:
    """An array with zeros after it along its axes, up to a shape; read in slices."""

    array: Any  # OnDisk, or of NumPy
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        ranges = ranges_of(part, self.shape)
        out = page_aligned(tuple(map(len, ranges)), self.dtype)
        given = tuple(
            slice(r.start, min(r.stop, size))
            for r, size in zip(ranges, self.array.shape, strict=True)
        )
        if all(x.start < x.stop for x in given):
            out[tuple(slice(x.stop - x.start) for x in given)] = self.array[given]
        return out


def ranges_of(part: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[range, ...]:
    """The indices that slices choose along each axis."""
    return tuple(range(*axis.indices(size)) for axis, size in zip(part, shape, strict=True))


def page_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX on CPU uses without a copy: aligned, in large pages.

    With small pages, page faults would take most of the loading time, and decoding one sequence
    would be slower by a tenth.
    """
    count = math.prod(shape)
    # Shared memory, which Python takes by default, has no large pages on most systems.
    size = max(count * dtype.itemsize, 1)
    if os.name == "posix":
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, count).reshape(shape)
