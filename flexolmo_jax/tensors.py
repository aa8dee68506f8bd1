"""Named tensors: the leaves of a tree by name, their digests, and their Orbax form on disk."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


# Orbax looks for the files of its other storage format, and warns at every load of ours.
logging.getLogger("absl").addFilter(
    lambda record: not str(record.msg).startswith("TensorStore data files not found")
)

# One file per tensor, uncompressed: a damaged file names its tensor, and loading is reading.
_STORAGE = ocp.options.ArrayOptions(
    saving=ocp.options.ArrayOptions.Saving(
        use_ocdbt=False, use_compression=False, enable_write_sharding_file=False
    )
)


def _this_process() -> ocp.options.MultiprocessingOptions:
    """Packages are written and read by one process, on its own."""
    this = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )


def save(path: Path, tensors: dict[str, Any]) -> None:
    """Writes tensors with Orbax into the new folder `path`."""
    with ocp.Context(array_options=_STORAGE, multiprocessing_options=_this_process()):
        ocp.save(path.absolute(), tensors)
    done = path / "commit_success.txt"
    if done.exists():  # Orbax puts the folder's path into it, which is the owner's business
        done.write_text("done")


def load(path: Path, tensors: dict[str, Any]) -> dict[str, jax.Array]:
    """Reads tensors with Orbax.

    Args:
      path: a folder that `save` wrote.
      tensors: {name: anything with a shape and a dtype}, exactly those that are there.

    Raises:
      ValueError: other names or shapes are stored; the text lists them.
    """
    try:
        with ocp.Context(multiprocessing_options=_this_process()):
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
        with ocp.Context(multiprocessing_options=_this_process()):
            return ocp.load(path.absolute(), abstract)
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: the tensors cannot be read ({error})") from error


def _difference(expected: dict[str, tuple], found: dict[str, tuple]) -> str:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"the tensor {name} {list(expected[name])} is missing"
        if name not in expected:
            return f"there is an unknown tensor {name} {list(found[name])}"
        if expected[name] != found[name]:
            return f"{name}: expected shape {list(expected[name])}, found {list(found[name])}"
    return "the tensors differ"
