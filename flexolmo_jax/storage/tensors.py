"""Named tensors: the leaves of a tree by name, their digests, and their Orbax form on disk."""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax.storage.integers import LARGEST


def named(tree: Any) -> dict[str, Any]:
    """{"feed_forward.gate": leaf, ...} of a tree of modules, tuples and dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves}


def refill(tree: Any, tensors: dict[str, Any]) -> Any:
    """The tree with each leaf replaced by the tensor of its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: tensors[leaf_name(path)], tree)


def leaf_name(path: tuple) -> str:
    """The name of a leaf from its path in a tree: "feed_forward.gate"."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def bytes_of(tree: Any) -> int:
    """The bytes of all leaves of a tree; they may be on disk."""
    return sum(leaf.nbytes for leaf in named(tree).values())


def describe(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: {shape, dtype, sha256}} of each tensor, for a manifest."""
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": _digest(x)}
        for name, x in sorted(tensors.items())
    }


def _digest(x: Any) -> str:
    array = np.ascontiguousarray(x)
    return hashlib.sha256(array.tobytes()).hexdigest()


# (unsigned type of the same width, all bits but the sign, first pattern that is out of range): of
# the patterns of a float, larger ones are larger numbers, then infinity, then NaN.
_PATTERNS = {
    "float32": ("<u4", 0x7FFF_FFFF, 0x4E80_0000),
    "bfloat16": ("<u2", 0x7FFF, 0x4E80),
    "float16": ("<u2", 0x7FFF, 0x7C00),
}
UNFIT = "weights that are NaN, infinite, or 2^30 and above, which can silence every expert"


def in_range(data: memoryview | bytes, dtype: str) -> bool:
    """Whether all numbers are finite and, in size, below 2^30: far above any useful weight.

    Integers are: their scales are numbers of their own.
    """
    if dtype in LARGEST:
        return True
    kind, mask, bound = _PATTERNS[dtype]
    patterns = np.frombuffer(data, kind, len(data) // np.dtype(kind).itemsize)
    return not patterns.size or int((patterns & np.asarray(mask, kind)).max()) < bound


def check_in_range(name: str, x: Any, where: Path) -> None:
    """Raises ValueError, naming it, if an array has weights that are not `in_range`."""
    if str(x.dtype) not in _PATTERNS:
        raise ValueError(f"{where}: the tensor {name} has the dtype {x.dtype}; expected a float")
    if not in_range(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data, str(x.dtype)):
        raise ValueError(f"{where}: the tensor {name} has {UNFIT}")


# Orbax looks for the files of its other storage format, and warns at every use of ours.
logging.getLogger("absl").addFilter(
    lambda record: not re.search("data files not found|merge of OCDBT", str(record.msg))
)


def _this_process() -> dict[str, Any]:
    """Options with which a single process writes a package, without waiting for the others."""
    this = jax.process_index()
    return {
        "primary_host": this,
        "active_processes": {this},
        "barrier_sync_key_prefix": f"process_{this}",
    }


def save(path: Path, tensors: dict[str, Any]) -> None:
    """Writes tensors with Orbax into the new folder `path`; a single process may call it.

    One file per tensor, uncompressed: a damaged file names its tensor, and loading is reading.
    """
    import orbax.checkpoint as v0  # only writing needs it

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
        done.write_text("done")  # Orbax writes the folder's path into it, which is private
    about = path / "_CHECKPOINT_METADATA"
    values = json.loads(about.read_text())  # and here Orbax writes the time, to the nanosecond
    values |= {name: None for name in values if name.endswith("_timestamp_nsecs")}
    about.write_text(json.dumps(values, sort_keys=True))
