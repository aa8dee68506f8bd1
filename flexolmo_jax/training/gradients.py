"""The gradient of a loss over a batch, on one device or a mesh, in microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import Training
from flexolmo_jax.parallel.collectives import psum_batch
from flexolmo_jax.parallel.mesh import BATCH, SHARDED, matrix_name, num_shards, specs
from flexolmo_jax.parallel.placement import shard_map


def check_batch(training: Training, mesh: Mesh | None, devices: str = "devices") -> None:
    """Checks that the devices can divide the batches of a stage.

    Args:
      training: the config.
      mesh: the mesh, or None for one device.
      devices: what the message calls the devices.

    Raises:
      ValueError: they cannot divide the sequences or the tokens.
    """
    count, data = 1 if mesh is None else num_shards(mesh), training.data
    if data.batch_size % (count * training.microbatches):
        raise ValueError(
            f"data.batch_size={data.batch_size} sequences cannot be divided among {count} "
            f"{devices}, {training.microbatches} microbatches each; make it a multiple of "
            f"{count * training.microbatches}"
        )
    if data.length % training.tensor_parallel:
        raise ValueError(
            f"data.length={data.length} tokens cannot be divided among "
            f"tensor_parallel={training.tensor_parallel} {devices}"
        )


def gradients(
    loss: Callable,
    mesh: Mesh | None,
    trainable: Any,
    frozen: Any,
    batch: Any,
    microbatches: int = 1,
) -> tuple[dict[str, jax.Array], Any]:
    """Computes the metrics of a loss and its gradient with respect to `trainable`.

    Args:
      loss: (trainable, frozen, batch) -> (value, metrics), both sums over the batch's sequences.
      mesh: the mesh of the arguments.
      trainable, frozen: sharded as `mesh.specs` says.
      batch: sharded as `mesh.BATCH`.
      microbatches: gradient accumulation steps per device; more of them use less memory.

    Returns:
      (metrics, gradient), sums over the whole batch; the gradient is sharded as `trainable`.
    """

    def local(trainable, frozen, batch):
        def of_microbatch(batch):
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch)
            return metrics, grads

        if microbatches == 1:
            sums = of_microbatch(batch)
        else:
            split = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, jnp.float32),
                jax.eval_shape(of_microbatch, jax.tree.map(lambda x: x[0], split)),
            )

            def add(sums, microbatch):
                # Without the barrier, XLA carries unreduced gradients through the loop, to sum them
                # over the devices once at its end; the pass that does so fails on the head's.
                new = jax.lax.optimization_barrier(of_microbatch(microbatch))
                return jax.tree.map(jnp.add, sums, new), None

            sums = jax.lax.scan(add, zeros, split)[0]
        metrics, grads = sums
        return psum_batch(metrics), _psum_replicated(grads)

    if mesh is None:
        return local(trainable, frozen, batch)
    trainable_specs = specs(trainable, mesh)
    in_specs = (trainable_specs, specs(frozen, mesh), BATCH)
    return shard_map(local, mesh, in_specs, (P(), trainable_specs))(trainable, frozen, batch)


def _psum_replicated(grads: Any) -> Any:
    """Sums the gradients of replicated leaves; those of sharded matrices are sums already."""
    return jax.tree_util.tree_map_with_path(
        lambda path, grad: grad if matrix_name(path) in SHARDED else psum_batch(grad), grads
    )
