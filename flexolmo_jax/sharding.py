"""One mesh, where each tensor lies on it, and everything that moves between its devices.

What runs on several devices runs inside one `jax.shard_map` (`spread`). Code in there sees its own
device's sequences and its own cut of each matrix, and is otherwise the code that one device runs:
the functions below that move something do nothing where there is no mesh. So the compiled program
communicates where this file says, and nowhere else.

- Sequences are divided among all devices.
- Every matrix is cut among all devices, and gathered one layer at a time, in the dtype of the
  activations; the gradient of a gather leaves each device the sum for its own cut.
- Experts of a stack that the axis `expert` divides stay on their devices: tokens travel to them
  (all-gather) and their answers back (reduce-scatter).
- Devices along the axis `tensor`, of size 1 unless a config asks, have the same sequences, and each
  its share of every layer's heads and hidden units: their answers are summed (Shoeybi et al. 2019,
  section 3). The output head is whole on each, for its share of the positions.
- Norms and router rows are small; every device has them.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import ModelConfig, Training

DATA, EXPERT = AXES = ("data", "expert")
TENSOR = "tensor"
ALL = (*AXES, TENSOR)
ROWS = P(AXES)  # of a batch
SERVING: tuple[str, ...] = ()  # a model in use is whole on every device, its experts aside
CUT = {  # the axis of each matrix that is cut: the model width, for `down` the hidden width
    "embed": -1, "head": -2, "q": -3, "k": -3, "v": -3, "o": -1, "gate": -2, "up": -2, "down": -2,
}  # fmt: skip
SHARED_OUT = {  # the axis of each matrix that devices along `tensor` share
    "q": -2, "k": -2, "v": -2, "o": -3, "gate": -1, "up": -1, "down": -2,
}  # fmt: skip
OF_EXPERTS = ("gate", "up", "down")  # [L, E, ...]
GATHERED = "gathered"  # name of gathered matrices, which are not kept for the backward pass


def make_mesh(expert_parallel: int = 1, devices: Any = None, tensor_parallel: int = 1) -> Mesh:
    """The mesh of all devices: axes `data`, `expert` and `tensor`.

    Args:
      expert_parallel: size of the axis `expert`.
      devices: default: all there are, of all processes.
      tensor_parallel: size of the axis `tensor`; 1 for a model in use.

    Raises:
      ValueError: the two do not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, inner = len(devices), expert_parallel * tensor_parallel
    if min(expert_parallel, tensor_parallel) < 1 or count % inner:
        raise ValueError(
            f"expert_parallel times tensor_parallel must divide the number of devices, {count}; "
            f"found {expert_parallel} times {tensor_parallel}"
        )
    shape = (count // inner, expert_parallel, tensor_parallel)
    # As `jax.make_mesh`, which refuses eight on a torus of 4x4x4: no axis of the torus is 8 or 2x4.
    torus = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(torus, ALL, axis_types=(AxisType.Explicit,) * 3)


def ways(mesh: Mesh) -> int:
    """Among how many devices sequences are divided."""
    return mesh.shape[DATA] * mesh.shape[EXPERT]


def check_batch(training: Training, mesh: Mesh | None, devices: str = "devices") -> None:
    """That a stage's batches can be divided as its config says.

    Args:
      training: the config.
      mesh: of the devices; None for one.
      devices: what the message calls them.

    Raises:
      ValueError: they cannot.
    """
    count, data = 1 if mesh is None else ways(mesh), training.data
    if data.batch_size % (count * training.parts):
        raise ValueError(
            f"data.batch_size={data.batch_size} sequences cannot be divided among {count} "
            f"{devices}, {training.parts} parts each; make it a multiple of "
            f"{count * training.parts}"
        )
    if data.length % training.tensor_parallel:
        raise ValueError(
            f"data.length={data.length} tokens cannot be divided among "
            f"tensor_parallel={training.tensor_parallel} {devices}"
        )


def specs(tree: Any, mesh: Mesh, over: tuple[str, ...] = AXES) -> Any:
    """The `PartitionSpec` of each leaf of modules, optimizer states and the like, by its name.

    Args:
      tree: of arrays, or of shapes.
      mesh: where it goes.
      over: the axes that matrices are cut over; () leaves them whole (for serving), but for
        experts on the axis `expert`.

    Raises:
      ValueError: a matrix cannot be cut evenly.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: _spec(path, x, mesh, over), tree)


def shardings(tree: Any, mesh: Mesh, over: tuple[str, ...] = AXES) -> Any:
    """As `specs`, on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh, over))


def specs_of(tree: Any, mesh: Mesh | None) -> Any:
    """The `PartitionSpec` of each array as it lies, here and inside of `jax.jit`; None for none."""
    return None if mesh is None else jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def _spec(path: tuple, leaf: Any, mesh: Mesh, over: tuple[str, ...]) -> P:
    name = _name(path)
    if name not in CUT:
        return P()
    parts: list[Any] = [None] * leaf.ndim
    if name in OF_EXPERTS and _stay(leaf.shape[-3], mesh):
        parts[-3] = EXPERT
        over = tuple(axis for axis in over if axis != EXPERT)
    if name in SHARED_OUT and mesh.shape[TENSOR] > 1:
        parts[SHARED_OUT[name]] = (TENSOR,)
    if over:
        parts[CUT[name]] = (*(parts[CUT[name]] or ()), *over)
    for size, axes in zip(leaf.shape, parts, strict=True):
        among = math.prod(mesh.shape[axis] for axis in axes) if isinstance(axes, tuple) else 1
        if size % among:
            raise ValueError(
                f"{name} {list(leaf.shape)} cannot be cut evenly among {among} devices along its "
                f"{size}; use a number of devices that divides it"
            )
    return P(*parts)


def _name(path: tuple) -> str:
    """The last part of a leaf's name: "gate" of feed_forward.gate."""
    text = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    return text.rsplit(".", 1)[-1]


def _stay(num_experts: int, mesh: Mesh) -> bool:
    ways = mesh.shape[EXPERT]
    return ways > 1 and num_experts % ways == 0


def place(
    tree: Any, mesh: Mesh | None, over: tuple[str, ...] = AXES, dtype: str | None = None
) -> Any:
    """Puts a tree, the same in all processes, on its devices.

    Of host arrays (also those in files, `tensors.OnDisk`, `tensors.Joined`) each device's part is
    read on its own, so that no more than that is held on the way.

    Args:
      tree: of arrays.
      mesh: of the devices; None for one.
      over: as in `specs`.
      dtype: of the result; default: as it is.
    """

    def read(x, part):
        found = x[part]
        if isinstance(x, np.ndarray):  # a copy: JAX goes on using the memory that it is given
            found = np.array(found)
        return np.asarray(found, dtype or x.dtype)

    if mesh is None:
        return jax.tree.map(
            lambda x: x.astype(dtype or x.dtype) if isinstance(x, jax.Array)
            else jnp.asarray(read(x, (slice(None),) * x.ndim)),
            tree,
        )  # fmt: skip

    def one(x, where):
        if isinstance(x, jax.Array) and (jax.process_count() == 1 or x.sharding == where):
            x = x if dtype in (None, x.dtype) else x.astype(dtype)  # else it would be copied
            return jax.device_put(x, where)
        return jax.make_array_from_callback(x.shape, where, lambda part: read(x, part))

    return jax.tree.map(one, tree, shardings(tree, mesh, over))


def build(make: Callable[[], Any], mesh: Mesh | None) -> Any:
    """make(), compiled; each device makes its own part, and the numbers are those of one."""
    if mesh is None:
        return jax.jit(make)()
    with within(mesh):
        return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Puts arrays [B, ...], the same in all processes, on the devices of their rows.

    Raises:
      ValueError: the devices do not divide B.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)

    def one(x):
        if len(x) % ways(mesh):
            raise ValueError(
                f"a batch of {len(x)} sequences cannot be divided among {ways(mesh)} devices; "
                f"make data.batch_size a multiple of {ways(mesh)}"
            )
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, ROWS), x.__getitem__)

    return jax.tree.map(one, tree)


def within(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which programs for a mesh are compiled and called."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_host(tree: Any) -> Any:
    """The whole of each leaf as NumPy, one leaf at a time; every process must take part."""

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = jax.device_put(x, NamedSharding(x.sharding.mesh, P()))
            return np.asarray(x.addressable_data(0))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def spread(f: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    """f, run by every device on its own part; f itself where there is no mesh."""
    if mesh is None:
        return f
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gradients(
    loss: Callable, mesh: Mesh | None, trainable: Any, frozen: Any, batch: Any, parts: int = 1
) -> tuple[dict[str, jax.Array], Any]:
    """Metrics of a loss, and its gradient with respect to `trainable`.

    Args:
      loss: (trainable, frozen, batch) -> (value, metrics), both sums over the batch's sequences.
      mesh: of the arguments.
      trainable, frozen: placed as `specs` says.
      batch: placed as `ROWS`.
      parts: each device works on its sequences in so many parts, one after the other.
    """

    def local(trainable, frozen, batch):
        def one(batch):
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch)
            return metrics, grads

        if parts == 1:
            sums = one(batch)
        else:
            split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, jnp.float32),
                jax.eval_shape(one, jax.tree.map(lambda x: x[0], split)),
            )

            def add(sums, part):
                # Behind a barrier: XLA would carry whole gradients through the loop, to sum them
                # over the devices once at its end, and its pass for that fails on the head's.
                return jax.tree.map(jnp.add, sums, jax.lax.optimization_barrier(one(part))), None

            sums = jax.lax.scan(add, zeros, split)[0]
        metrics, grads = sums
        return total(metrics), _whole_sums(grads)

    if mesh is None:
        return local(trainable, frozen, batch)
    cut = specs(trainable, mesh)
    return spread(local, mesh, (cut, specs(frozen, mesh), ROWS), (P(), cut))(
        trainable, frozen, batch
    )


def _whole_sums(grads: Any) -> Any:
    """Gradients of what every device has are summed; those of cut matrices have been."""
    return jax.tree_util.tree_map_with_path(
        lambda path, grad: grad if _name(path) in CUT else total(grad), grads
    )


# What follows is called inside of `spread`.


def is_spread() -> bool:
    """Whether this is traced inside of `spread`."""
    return ALL == jax.sharding.get_abstract_mesh().manual_axes


def platform() -> str:
    """What the program is compiled for: cpu, gpu or tpu; also where that is not at hand."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def total(tree: Any) -> Any:
    """The sum over all sequences' devices."""
    return jax.lax.psum(tree, AXES) if is_spread() else tree


def first_row(rows: int) -> jax.Array | int:
    """The number, in the whole batch, of this device's first sequence."""
    return jax.lax.axis_index(AXES) * rows if is_spread() else 0


def gather(module: Any, config: ModelConfig, stay: bool = False) -> Any:
    """A module whose matrices are whole.

    Args:
      module: of one layer; not an `Experts` (see `gather_experts`).
      config: the sizes, and the dtype in which matrices travel.
      stay: the experts in it stay on their devices.
    """
    if not is_spread():
        return module

    def one(path, leaf):
        return leaf if _name(path) not in CUT else whole(_name(path), leaf, config, stay)

    return jax.tree_util.tree_map_with_path(one, module)


def whole(name: str, leaf: jax.Array, config: ModelConfig, stay: bool = False) -> jax.Array:
    """A matrix by its name, put together from all devices' cuts."""
    if not is_spread():
        return leaf
    size, here = config.width, leaf.shape[CUT[name]]
    if name == "down":
        size = config.ffn_width // jax.lax.axis_size(TENSOR)
    if name not in SHARED_OUT:  # the head: each device works on its own positions
        leaf = to_tensor(leaf)
    if here == size:
        return leaf
    axes: tuple[str, ...] = AXES
    if stay:
        axes = (DATA,)
    elif size // here != jax.lax.axis_size(AXES):
        axes = (EXPERT,)
    axis = leaf.ndim + CUT[name]
    leaf = jax.lax.all_gather(leaf.astype(config.dtype), axes, axis=axis, tiled=True)
    return checkpoint_name(leaf, GATHERED)


def gather_experts(stack: Any, config: ModelConfig) -> Any:
    """A stack whose matrices are whole; of the experts that stay, each device has its own."""
    return gather(stack, config, stay=some_are_away(stack))


def some_are_away(stack: Any) -> bool:
    """Whether other devices have some of a stack's experts (of one layer, router rows whole)."""
    return is_spread() and stack.feed_forward.gate.shape[0] < stack.router.bias.shape[0]


def look_up(embed: jax.Array, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """embed[tokens] in the dtype of the activations, [V, D] and [B, S] -> [B, S, D].

    Each device looks up its own cut of the width, for all sequences, and sends it to theirs: what
    travels are activations, and the gradient never has the size of the table.
    """
    if not is_spread() or embed.shape[-1] == config.width:
        return embed[tokens].astype(config.dtype)
    everyone = jax.lax.all_gather(tokens, AXES, tiled=True)
    slices = embed[everyone].astype(config.dtype)
    return jax.lax.all_to_all(slices, AXES, split_axis=0, concat_axis=2, tiled=True)


def to_experts(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What this device's experts need: [B, S, D], [E, B, S] -> all sequences', own experts'."""
    x = jax.lax.all_gather(x, EXPERT, tiled=True)
    return x, jax.lax.all_to_all(weights, EXPERT, split_axis=0, concat_axis=1, tiled=True)


def from_experts(out: jax.Array) -> jax.Array:
    """The sum of all experts' answers, for this device's sequences."""
    return jax.lax.psum_scatter(out, EXPERT, tiled=True)


# Along the axis `tensor`, whose devices have the same activations and gradients of them. What each
# computes of its own share of a layer is a part of a sum: the answer forward, and backward the
# gradient of what all have.


def shares_layers() -> bool:
    """Whether this device has only its share of every layer's heads and hidden units."""
    return is_spread() and jax.lax.axis_size(TENSOR) > 1


def to_tensor(tree: Any) -> Any:
    """What all devices along `tensor` have and each uses for its share: its gradient is a sum."""
    return jax.tree.map(_to_tensor, tree) if shares_layers() else tree


def from_tensor(tree: Any) -> Any:
    """The sum of all shares' answers, which all devices along `tensor` go on with."""
    return jax.tree.map(_from_tensor, tree) if shares_layers() else tree


def own_positions(x: jax.Array) -> jax.Array:
    """Of [B, S, ...], this device's share of the positions: [B, S / ways, ...]."""
    return _own_positions(x) if shares_layers() else x


@jax.custom_vjp
def _to_tensor(x):
    return x


_to_tensor.defvjp(lambda x: (x, None), lambda _, d: (jax.lax.psum(d, TENSOR),))


@jax.custom_vjp
def _from_tensor(x):
    return jax.lax.psum(x, TENSOR)


_from_tensor.defvjp(lambda x: (jax.lax.psum(x, TENSOR), None), lambda _, d: (d,))


@jax.custom_vjp
def _own_positions(x):
    size = x.shape[1] // jax.lax.axis_size(TENSOR)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TENSOR) * size, size, axis=1)


_own_positions.defvjp(
    lambda x: (_own_positions(x), None),
    lambda _, d: (jax.lax.all_gather(d, TENSOR, axis=1, tiled=True),),
)


def own_heads(scale: jax.Array, heads: int) -> jax.Array:
    """Of the scales of all heads [N, H], those of this device's."""
    first = jax.lax.axis_index(TENSOR) * heads
    return jax.lax.dynamic_slice_in_dim(to_tensor(scale), first, heads)


def mean_of_shares(x: jax.Array) -> jax.Array:
    """The mean over devices along `tensor`, each of which uses it for its own share."""
    return jax.lax.pmean(x, TENSOR)
