"""The mesh of devices, and which axis of each matrix is sharded over it.

- A batch's sequences are sharded over all devices of the axes `data` and `expert`.
- Every matrix is sharded over all devices, and all-gathered one layer at a time, in the dtype of
  the activations.
- The experts of a stack that the axis `expert` divides stay on their devices: tokens travel to them
  and their outputs travel back (expert parallelism).
- Devices along the axis `tensor`, of size 1 unless a config asks, hold the same sequences and each
  a share of every layer's heads and hidden units (tensor parallelism, Shoeybi et al. 2019,
  section 3). The output head is whole on each of them, for its share of the positions.
- Norms and router rows are small and replicated.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexolmo_jax.storage.tensors import leaf_name

DATA, EXPERT = AXES = ("data", "expert")
TENSOR = "tensor"
ALL_AXES = (*AXES, TENSOR)
BATCH = P(AXES)  # the sequences of a batch
SERVING: tuple[str, ...] = ()  # a model in use is replicated, its experts aside


class Axes(NamedTuple):
    """Which axes of a matrix are sharded over which axes of the mesh."""

    batch: int  # over `data` and `expert`: the model width, or the hidden width of `down`
    tensor: int | None = None  # over `tensor`
    expert: int | None = None  # over `expert`, if that divides the number of experts


SHARDED = {  # all matrices by name; every other leaf is replicated
    "embed": Axes(-1),
    "head": Axes(-2),
    "q": Axes(-3, tensor=-2),
    "k": Axes(-3, tensor=-2),
    "v": Axes(-3, tensor=-2),
    "o": Axes(-1, tensor=-3),
    "gate": Axes(-2, tensor=-1, expert=-3),
    "up": Axes(-2, tensor=-1, expert=-3),
    "down": Axes(-2, tensor=-2, expert=-3),
}


def make_mesh(expert_parallel: int = 1, devices: Any = None, tensor_parallel: int = 1) -> Mesh:
    """The mesh of all devices, with the axes `data`, `expert` and `tensor`.

    Args:
      expert_parallel: size of the axis `expert`.
      devices: default: all devices of all processes.
      tensor_parallel: size of the axis `tensor`; 1 for a model in use.

    Raises:
      ValueError: the product of the two does not divide the number of devices.

    Examples:
      >>> import flexolmo_jax as fo
      >>> mesh = fo.make_mesh()  # of all devices
      >>> mesh.axis_names
      ('data', 'expert', 'tensor')
      >>> model = fo.load("ours", mesh=mesh)
    """
    devices = jax.devices() if devices is None else devices
    count, inner = len(devices), expert_parallel * tensor_parallel
    if min(expert_parallel, tensor_parallel) < 1 or count % inner:
        raise ValueError(
            f"expert_parallel times tensor_parallel must divide the number of devices, {count}; "
            f"found {expert_parallel} times {tensor_parallel}"
        )
    shape = (count // inner, expert_parallel, tensor_parallel)
    # `jax.make_mesh` refuses eight on a torus of 4x4x4, because no axis of the torus is 8 or 2x4.
    torus = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(torus, ALL_AXES, axis_types=(AxisType.Explicit,) * 3)


def num_shards(mesh: Mesh) -> int:
    """The number of devices over which a batch's sequences are sharded."""
    return mesh.shape[DATA] * mesh.shape[EXPERT]


def specs(tree: Any, mesh: Mesh, over: tuple[str, ...] = AXES) -> Any:
    """The `PartitionSpec` of each leaf of modules, optimizer states and the like, by its name.

    Args:
      tree: a pytree of arrays, or of shapes.
      mesh: the mesh that the leaves are placed on.
      over: the axes over which matrices are sharded; () replicates them (for serving), except
        experts on the axis `expert`.

    Raises:
      ValueError: a matrix cannot be sharded evenly.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: _spec(path, x, mesh, over), tree)


def shardings(tree: Any, mesh: Mesh, over: tuple[str, ...] = AXES) -> Any:
    """The `NamedSharding` of each leaf; arguments as in `specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh, over))


def specs_of(tree: Any, mesh: Mesh | None) -> Any:
    """Each array's own `PartitionSpec`, also inside `jax.jit`; None without a mesh."""
    return None if mesh is None else jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def matrix_name(path: tuple) -> str:
    """The last part of a leaf's name: "gate" of feed_forward.gate."""
    return leaf_name(path).rsplit(".", 1)[-1]


def _spec(path: tuple, leaf: Any, mesh: Mesh, over: tuple[str, ...]) -> P:
    name = matrix_name(path)
    if name not in SHARDED:
        return P()
    sharded = SHARDED[name]
    spec: list[Any] = [None] * leaf.ndim
    if sharded.expert and _is_expert_parallel(leaf.shape[sharded.expert], mesh):
        spec[sharded.expert] = EXPERT
        over = tuple(axis for axis in over if axis != EXPERT)
    if sharded.tensor and mesh.shape[TENSOR] > 1:
        spec[sharded.tensor] = (TENSOR,)
    if over:
        spec[sharded.batch] = (*(spec[sharded.batch] or ()), *over)
    for size, axes in zip(leaf.shape, spec, strict=True):
        shards = math.prod(mesh.shape[axis] for axis in axes) if isinstance(axes, tuple) else 1
        if size % shards:
            raise ValueError(
                f"{name} {list(leaf.shape)} cannot be sharded evenly over {shards} devices along "
                f"its {size}; use a number of devices that divides it"
            )
    return P(*spec)


def _is_expert_parallel(num_experts: int, mesh: Mesh) -> bool:
    size = mesh.shape[EXPERT]
    return size > 1 and num_experts % size == 0


def check_for_use(mesh: Mesh | None, int8: bool) -> None:
    """Raises ValueError if a model cannot be loaded for use so: over a mesh, in 8-bit integers."""
    if mesh is not None and mesh.shape[TENSOR] > 1:
        raise ValueError(
            "a model in use cannot share its layers among devices: make its mesh without "
            "tensor_parallel"
        )
    if int8 and (jax.default_backend() != "cpu" or mesh is not None):
        raise ValueError("int8 weights are for one CPU; on GPU, TPU or a mesh use bfloat16")
