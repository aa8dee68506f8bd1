"""Named tensors: the leaves of a tree by name, their digests, and their Orbax form on disk."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import mmap
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
from orbax.checkpoint import v1 as ocp


def named(tree: Any) -> dict[str, Any]:
    """{"feed_forward.gate": leaf, ...} of a tree of modules, tuples and dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def refill(tree: Any, tensors: dict[str, Any]) -> Any:
    """The tree with each leaf replaced by the tensor of its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: tensors[_name(path)], tree)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def describe(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: {shape, dtype, sha256}} of each tensor, for a manifest."""
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": _digest(x)}
        for name, x in sorted(tensors.items())
    }


def _digest(x: Any) -> str:
    array = np.ascontiguousarray(x)
    return hashlib.sha256(array.tobytes()).hexdigest()


# Orbax looks for the files of its other storage format, and warns at every use of ours.
logging.getLogger("absl").addFilter(
    lambda record: not re.search("data files not found|merge of OCDBT", str(record.msg))
)


def _this_process() -> dict[str, Any]:
    """Packages are written and read by one process, on its own."""
    this = jax.process_index()
    return {
        "primary_host": this,
        "active_processes": {this},
        "barrier_sync_key_prefix": f"process_{this}",
    }


def _alone() -> ocp.Context:
    context = ocp.Context()
    for name, value in _this_process().items():
        setattr(context.multiprocessing, name, value)
    return context


def save(path: Path, tensors: dict[str, Any]) -> None:
    """Writes tensors with Orbax into the new folder `path`; one process may do it alone.

    One file per tensor, uncompressed: a damaged file names its tensor, and loading is reading.
    """
    # Orbax's v0 interface, since v1's `save` waits for all processes (0.12.8); the files are those
    # that v1 reads and writes.
    alone = v0.options.MultiprocessingOptions(**_this_process())
    matrices = v0.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, use_compression=False, multiprocessing_options=alone
    )
    handler = v0.CompositeCheckpointHandler(
        state=matrices, composite_options=v0.CompositeOptions(multiprocessing_options=alone)
    )
    on_host = {name: np.asarray(x) for name, x in tensors.items()}
    with v0.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(
            path.absolute(), args=v0.args.Composite(state=v0.args.PyTreeSave(on_host))
        )
    (path / "orbax.checkpoint").touch()  # by this v1 knows its own layout
    for done in path.rglob("commit_success.txt"):
        done.write_text("done")  # Orbax puts the folder's path into it, the owner's business


def load(path: Path, tensors: dict[str, Any]) -> dict[str, jax.Array]:
    """Reads tensors with Orbax.

    Args:
      path: a folder that `save` wrote.
      tensors: {name: anything with a shape and a dtype}, exactly those that are there.

    Raises:
      ValueError: other names or shapes are stored; the text lists them.
    """
    try:
        with _alone():
            stored = ocp.metadata(path.absolute()).metadata
        found = {name: tuple(x.shape) for name, x in stored.items()}
        expected = {name: tuple(x.shape) for name, x in tensors.items()}
        if found != expected:
            raise ValueError(f"{path}: {_difference(expected, found)}")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=here)
            for name, x in tensors.items()
        }
        with _alone():
            return ocp.load(path.absolute(), abstract)
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: the tensors cannot be read ({error})") from error


def on_disk(path: Path, tensors: dict[str, Any]) -> dict[str, "OnDisk"]:
    """The tensors of a folder that `save` wrote, left in their files.

    Nothing is read before it is used, and then only the part that is: a device's share of a
    matrix, without the rest passing through memory.

    Raises:
      ValueError: they are stored in another way, or with other shapes.
    """
    return {name: _find(path / "state" / name, name, x) for name, x in tensors.items()}


def _find(folder: Path, name: str, like: Any) -> "OnDisk":
    """Zarr 3 as `save` has Orbax write it: the bytes of the array, then an index of one entry."""
    file = folder / "zarr.json"
    if not file.exists():
        raise ValueError(f"{folder}: the tensor {name} {list(like.shape)} is missing")
    about, shape = json.loads(file.read_text()), list(like.shape)
    if about["shape"] != shape:
        raise ValueError(f"{folder}: {name}: expected shape {shape}, found {about['shape']}")
    little = [{"name": "bytes", "configuration": {"endian": "little"}}]
    (codec,) = about["codecs"]
    chunks = about["chunk_grid"]["configuration"]["chunk_shape"], codec["configuration"]
    if chunks[0] != shape or chunks[1].get("chunk_shape") != shape or chunks[1]["codecs"] != little:
        raise ValueError(f"{folder}: {name}: expected one uncompressed file, found {about}")
    dtype, data = jnp.dtype(about["data_type"]), folder.joinpath("c", *("0" for _ in shape))
    if not data.exists():  # nothing but the fill value is not written at all
        return OnDisk(None, 0, dtype, tuple(shape), about["fill_value"])
    with open(data, "rb") as opened:
        opened.seek(-20, os.SEEK_END)
        offset, count = np.frombuffer(opened.read(16), "<u8").tolist()
    if count != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{data}: {name}: expected its bytes, found {count} of them")
    return OnDisk(data, offset, dtype, tuple(shape))


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """An array in a file, read by parts; one of those that `sharding.place` takes."""

    file: Path | None  # None: it is `fill` throughout
    offset: int  # of its first byte
    dtype: np.dtype
    shape: tuple[int, ...]
    fill: float = 0.0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        ranges = _ranges(part, self.shape)
        out = _empty(tuple(map(len, ranges)), self.dtype)
        self.read(ranges, out)
        return out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[(slice(None),) * self.ndim], dtype)

    def read(self, ranges: tuple[range, ...], out: np.ndarray) -> None:
        """Reads a part into `out`, of its shape; the bytes go nowhere else on the way.

        Raises:
          ValueError: the file ends too early.
        """
        if self.file is None or not out.size:
            out[...] = self.fill
            return
        # A run: as many of the last axes as lie together, in the file and in `out`.
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


SMALL_RUN = 65_536  # bytes; of shorter ones, one system call each would take too long


@dataclasses.dataclass(frozen=True)
class Joined:
    """Arrays [L, E_i, ...] end to end along axis 1, read by parts; as `OnDisk`.

    Of several dtypes, it is of the one that holds them all: beside an anchor in half precision,
    trained experts are float32.
    """

    arrays: tuple[Any, ...]  # OnDisk, or of NumPy or JAX
    empty: int = 0  # so many more after them
    fill: float = 0.0  # filled with this

    @property
    def shape(self) -> tuple[int, ...]:
        layers, _, *rest = self.arrays[0].shape
        return (layers, sum(x.shape[1] for x in self.arrays) + self.empty, *rest)

    @property
    def ndim(self) -> int:
        return self.arrays[0].ndim

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(jnp.result_type(*(x.dtype for x in self.arrays)))

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        layers, wanted, *rest = _ranges(part, self.shape)
        out = _empty((len(layers), len(wanted), *map(len, rest)), self.dtype)
        first = done = 0  # experts before this array; in `out` already
        for x in self.arrays:
            here = range(max(wanted.start, first), min(wanted.stop, first + x.shape[1]))
            if here:
                own = range(here.start - first, here.stop - first)
                into, ranges = out[:, done : done + len(here)], (layers, own, *rest)
                if isinstance(x, OnDisk) and x.dtype == out.dtype:
                    x.read(ranges, into)
                else:
                    into[...] = x[tuple(slice(r.start, r.stop) for r in ranges)]
                done += len(here)
            first += x.shape[1]
        out[:, done:] = self.fill
        return out


def _ranges(part: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[range, ...]:
    return tuple(range(*one.indices(size)) for one, size in zip(part, shape, strict=True))


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX on CPU takes over as it is: aligned, and of the system's large pages.

    Most of the time of loading would else go into touching small ones for the first time.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(count * dtype.itemsize, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, count).reshape(shape)


def _difference(expected: dict[str, tuple], found: dict[str, tuple]) -> str:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"the tensor {name} {list(expected[name])} is missing"
        if name not in expected:
            return f"there is an unknown tensor {name} {list(found[name])}"
        if expected[name] != found[name]:
            return f"{name}: expected shape {list(expected[name])}, found {list(found[name])}"
    return "the tensors differ"
