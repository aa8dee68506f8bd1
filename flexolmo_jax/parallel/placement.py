"""Moves arrays between host memory and the devices of a mesh, and runs functions on it.

Without a mesh (`None`) everything happens on one device, so callers need no second path.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexolmo_jax.parallel.mesh import AXES, BATCH, num_shards, shardings


def device_put(
    tree: Any, mesh: Mesh | None, over: tuple[str, ...] = AXES, dtype: str | None = None
) -> Any:
    """Puts a tree, the same in all processes, onto the devices of a mesh.

    Each device's shard of a host array (also of one in a file: `storage.on_disk`) is read on its
    own, so no process holds more than its shards.

    Args:
      tree: a pytree of arrays.
      mesh: the mesh, or None for one device.
      over: as in `mesh.specs`.
      dtype: of the result; default: unchanged.
    """

    def read(x, index):
        shard = x[index]
        if isinstance(x, np.ndarray):  # a copy: JAX keeps using the memory that it is given
            shard = np.array(shard)
        return np.asarray(shard, dtype or x.dtype)

    if mesh is None:
        return jax.tree.map(
            lambda x: x.astype(dtype or x.dtype) if isinstance(x, jax.Array)
            else jax.device_put(read(x, (slice(None),) * x.ndim), may_alias=True),
            tree,
        )  # fmt: skip

    def put(x, sharding):
        if isinstance(x, jax.Array) and (jax.process_count() == 1 or x.sharding == sharding):
            x = x if dtype in (None, x.dtype) else x.astype(dtype)  # `astype` always copies
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: read(x, index))

    return jax.tree.map(put, tree, shardings(tree, mesh, over))


def init_sharded(init: Callable[[], Any], mesh: Mesh | None) -> Any:
    """Runs `init` compiled, directly into the sharded layout; values do not depend on the mesh."""
    if mesh is None:
        return jax.jit(init)()
    with use_mesh(mesh):
        return jax.jit(init, out_shardings=shardings(jax.eval_shape(init), mesh))()


def put_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Puts arrays [B, ...], the same in all processes, onto the devices of their sequences.

    Raises:
      ValueError: the number of devices does not divide B.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)

    def put(x):
        if len(x) % num_shards(mesh):
            raise ValueError(
                f"a batch of {len(x)} sequences cannot be divided among {num_shards(mesh)} "
                f"devices; make data.batch_size a multiple of {num_shards(mesh)}"
            )
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, BATCH), x.__getitem__)

    return jax.tree.map(put, tree)


def put_padded_batch(tree: Any, mesh: Mesh | None) -> Any:
    """As `put_batch`, of any B: the last row is repeated until the devices divide it."""
    num_devices = 1 if mesh is None else mesh.size
    padded = jax.tree.map(
        lambda x: np.concatenate([x, np.repeat(x[-1:], -len(x) % num_devices, axis=0)]), tree
    )
    return put_batch(padded, mesh)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which programs for a mesh are compiled and called."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def to_host(tree: Any) -> Any:
    """Each leaf, whole, as NumPy, one leaf at a time; every process must call it."""

    def fetch(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = jax.device_put(x, NamedSharding(x.sharding.mesh, P()))
            return np.asarray(x.addressable_data(0))
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


def shard_map(
    f: Callable, mesh: Mesh | AbstractMesh | None, in_specs: Any, out_specs: Any
) -> Callable:
    """`jax.shard_map` of f; f itself without a mesh. Inside, use `collectives`."""
    if mesh is None:
        return f
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
