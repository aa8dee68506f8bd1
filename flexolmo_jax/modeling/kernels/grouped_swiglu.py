"""SwiGLU experts over routed rows only: rows are sorted by expert, then computed group by group.

A *row* is a (token, expert) pair. On TPU and GPU the matmuls are `jax.lax.ragged_dot`, which on CPU
costs E times as much. There a loop computes blocks of each expert's rows; it copies the expert's
weights, which costs as much as a few hundred rows. So if experts have fewer rows than that, and
similar numbers of them, one batched matmul computes the first rows of all experts, and the loop
computes the remaining ones.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexolmo_jax.parallel import collectives

BLOCK_SIZES = (128, 256, 512)  # rows per step of the loop: the largest below the mean per expert
LAST_BLOCK_SIZES = 8  # an expert's last block is padded to a multiple of 1/8 of a block
BATCHED_MAX_ROWS = 512  # mean rows per expert; with more, the batched matmul's padding is too slow
BATCHED_SPARE_ROWS = 32  # capacity of the batched matmul per expert, beyond the mean
BATCHED_MAX_REMAINDER = 1 / 8  # of all rows, left to the loop; with more, the loop computes all


def grouped_swiglu(
    x: Float[Array, "T D"],
    weights: Float[Array, "E T"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    active: int,
) -> Float[Array, "T D"]:
    """sum over e of weights[e] * swiglu_e(x), computed only where the weight is not 0.

    At most `active` (A) weights per token may differ from 0.
    """
    num_experts = len(gate)
    weights, experts = jax.lax.top_k(weights.T, min(active, num_experts))  # [T, A] each
    experts = jnp.where(weights > 0, experts, num_experts)  # sorted to the end
    order = jnp.argsort(experts.reshape(-1), stable=True)
    inverse = jnp.argsort(order).reshape(experts.shape)  # [T, A]: the sorted row of each pair
    sizes = jnp.bincount(experts.reshape(-1), length=num_experts)
    rows = _gather_sorted(x, order, inverse)
    rows = _swiglu_of_groups(rows, gate, up, down, sizes, max_rows=len(x))
    out = jnp.where(weights[..., None] > 0, _gather_back(rows, order, inverse), 0)
    return jnp.sum(out * weights[..., None].astype(x.dtype), axis=1)


# Sorting rows and sorting them back are each other's gradients. Both are gathers; JAX would make
# each gradient a scatter.


@jax.custom_vjp
def _gather_sorted(x, order, inverse):
    """[T, D] -> [T * A, D], sorted by expert."""
    return x[order // inverse.shape[1]]


_gather_sorted.defvjp(
    lambda x, order, inverse: (_gather_sorted(x, order, inverse), inverse),
    lambda inverse, d: (jnp.sum(d[inverse], axis=1), None, None),
)


@jax.custom_vjp
def _gather_back(rows, order, inverse):
    """[T * A, D] -> [T, A, D], by token."""
    return rows[inverse]


_gather_back.defvjp(
    lambda rows, order, inverse: (rows[inverse], order),
    lambda order, d: (d.reshape(-1, d.shape[-1])[order], None, None),
)


def _swiglu_of_groups(rows, gate, up, down, sizes, max_rows: int):
    """Applies each expert to its sorted rows [R, D]; rows of no expert have undefined results.

    Args:
      sizes: int [E], rows of each expert.
      max_rows: upper bound of `sizes`.
    """
    if collectives.platform() == "cpu":
        return _on_cpu(rows, gate, up, down, sizes, max_rows)
    if collectives.platform() == "gpu":
        # XLA may compute every group for every row, and sum products that it has masked with 0: an
        # expert that nobody uses, but whose weights are NaN, would turn all rows into NaN.
        is_used = (sizes > 0)[:, None, None]
        gate, up, down = (jnp.where(is_used, matrix, 0) for matrix in (gate, up, down))
    ragged = functools.partial(jax.lax.ragged_dot, group_sizes=sizes.astype(jnp.int32))
    return ragged(jax.nn.silu(ragged(rows, gate)) * ragged(rows, up), down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _on_cpu(rows, gate, up, down, sizes, max_rows):
    def compute(rows, gate, up, down):
        return (((jax.nn.silu(rows @ gate) * (rows @ up)) @ down,), ())

    layout = _Layout.of(sizes, len(rows), max_rows)
    (out,), _ = _over_experts(compute, (layout.split(rows),), (gate, up, down), layout)
    return layout.join(out)


def _forward(rows, gate, up, down, sizes, max_rows):
    def compute(rows, gate, up, down):
        g, u = rows @ gate, rows @ up
        return ((jax.nn.silu(g) * u) @ down, g, u), ()

    layout = _Layout.of(sizes, len(rows), max_rows)
    (out, g, u), _ = _over_experts(compute, (layout.split(rows),), (gate, up, down), layout)
    return layout.join(out), (rows, g, u, gate, up, down, sizes)


def _backward(max_rows, residuals, d_out):
    rows, g, u, gate, up, down, sizes = residuals
    layout = _Layout.of(sizes, len(rows), max_rows)

    def compute(rows, g, u, d_out, gate, up, down):
        sigmoid = jax.nn.sigmoid(g)
        silu = g * sigmoid
        d_hidden = d_out @ down.T
        d_g = d_hidden * u * (sigmoid + silu * (1 - sigmoid))
        d_u = d_hidden * silu
        d_rows = d_g @ gate.T + d_u @ up.T
        return (d_rows,), (rows.T @ d_g, rows.T @ d_u, (silu * u).T @ d_out)

    arrays = (layout.split(rows), g, u, layout.split(d_out))
    (d_rows,), d_weights = _over_experts(compute, arrays, (gate, up, down), layout)
    d_rows = jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(sizes), layout.join(d_rows), 0)
    return d_rows, *d_weights, None


_on_cpu.defvjp(_forward, _backward)


class _SplitRows(NamedTuple):
    """Rows for the batched matmul and for the loop; `_Layout` says which of the two is valid."""

    batched: jax.Array  # [E, C, ...]: the first rows of each expert, padded with 0
    sorted: jax.Array  # [R + block, ...]: all rows, sorted by expert


class _Layout(NamedTuple):
    """Which rows belong to which expert, and whether the batched matmul computes any of them."""

    starts: jax.Array  # int [E]
    sizes: jax.Array  # int [E]
    is_batched: jax.Array  # bool: the batched matmul computes C rows of each expert; else none
    batched_rows: jax.Array  # int [E, C]: indices of sorted rows
    expert: jax.Array  # int [R]: of a sorted row
    rank: jax.Array  # int [R]: of a sorted row, among those of its expert
    block: int  # rows per step of the loop

    @classmethod
    def of(cls, sizes: jax.Array, num_rows: int, max_rows: int) -> "_Layout":
        mean = num_rows / len(sizes)
        block = max(size for size in BLOCK_SIZES if size <= max(mean, BLOCK_SIZES[0]))
        capacity = -(-int(mean + BATCHED_SPARE_ROWS) // 16) * 16
        capacity = 0 if mean >= BATCHED_MAX_ROWS else min(capacity, max_rows)
        capacity = max_rows if mean == max_rows else capacity
        ends = jnp.cumsum(sizes)
        starts = ends - sizes
        remainder = jnp.sum(jnp.maximum(sizes - capacity, 0))
        is_batched = remainder <= BATCHED_MAX_REMAINDER * jnp.sum(sizes)
        batched_rows = starts[:, None] + jnp.arange(capacity)
        row = jnp.arange(num_rows)
        expert = jnp.minimum(jnp.searchsorted(ends, row, side="right"), len(sizes) - 1)
        rank = row - starts[expert]
        return cls(starts, sizes, is_batched, batched_rows, expert, rank, block)

    @property
    def capacity(self) -> int:
        return self.batched_rows.shape[1]

    @property
    def num_batched(self) -> jax.Array:
        """Rows of each expert that the batched matmul computes."""
        return jnp.where(self.is_batched, self.capacity, 0)

    def split(self, rows: jax.Array) -> _SplitRows:
        """Sorted rows [R, ...], for the batched matmul and for the loop."""
        is_own = jnp.arange(self.capacity) < self.sizes[:, None]
        rows_or_last = rows[jnp.minimum(self.batched_rows, len(rows) - 1)]
        batched = jnp.where(is_own[..., None], rows_or_last, 0)
        return _SplitRows(batched, jnp.pad(rows, ((0, self.block), (0, 0))))

    def join(self, rows: _SplitRows) -> jax.Array:
        """The inverse of `split`: [R, ...]."""
        num_rows = len(self.expert)
        if not self.capacity:
            return rows.sorted[:num_rows]
        batched = rows.batched[self.expert, jnp.minimum(self.rank, self.capacity - 1)]
        is_batched = (self.rank < self.num_batched)[:, None]
        return jnp.where(is_batched, batched, rows.sorted[:num_rows])


def _compute_first(compute, size: int, block: int, rows, weights):
    """The results of the first `size` rows of a block, padded to the block with zeros."""
    out, addends = compute(*(x[:size] for x in rows), *weights)
    return tuple(jnp.pad(x, ((0, block - size), (0, 0))) for x in out), addends


def _over_experts(compute, arrays: tuple[_SplitRows, ...], weights, layout: _Layout):
    """Runs `compute(*rows, *weights of their expert)` over all rows of all experts.

    In the loop, an expert's last block may overlap rows of the next expert. They are set to 0
    before `compute`; the next expert, which is computed later, overwrites their results.

    Args:
      compute: returns rows [m, ...], and addends that are summed over the rows of each expert.
      arrays, layout: the rows, and where those of each expert lie.
      weights: [E, ...] each.

    Returns:
      the rows, and the sums [E, ...].
    """

    def run_batched():
        return jax.vmap(compute)(*(x.batched for x in arrays), *weights)

    shapes = jax.eval_shape(run_batched)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    batched, sums = (
        jax.lax.cond(layout.is_batched, run_batched, zeros) if layout.capacity else zeros()
    )

    block, step = layout.block, layout.block // LAST_BLOCK_SIZES
    branches = [
        functools.partial(_compute_first, compute, m, block) for m in range(step, block + 1, step)
    ]
    num_remaining = jnp.maximum(layout.sizes - layout.num_batched, 0)
    order = jnp.argsort(num_remaining == 0, stable=True)  # experts with remaining rows come first

    def run_expert(i, carry):
        expert = order[i]
        outs, sums = carry
        own = tuple(jax.lax.dynamic_index_in_dim(w, expert, keepdims=False) for w in weights)
        start, count = layout.starts[expert] + layout.num_batched, num_remaining[expert]

        def run_block(i, carry):
            outs, sums = carry
            first = start + i * block
            is_own = jnp.arange(block) < count - i * block
            rows = tuple(jax.lax.dynamic_slice_in_dim(x.sorted, first, block) for x in arrays)
            rows = tuple(jnp.where(is_own[:, None], x, 0) for x in rows)
            branch = -(-jnp.minimum(count - i * block, block) // step) - 1
            results, addends = jax.lax.switch(branch, branches, rows, own)
            outs = tuple(
                jax.lax.dynamic_update_slice_in_dim(out, new, first, 0)
                for out, new in zip(outs, results, strict=True)
            )
            return outs, jax.tree.map(jnp.add, sums, addends)

        # A separate sum for each expert: on CPU, adding to a slice of a large array is slow.
        expert_sums = tuple(jnp.zeros(x.shape[1:], x.dtype) for x in sums)
        outs, expert_sums = jax.lax.fori_loop(0, -(-count // block), run_block, (outs, expert_sums))
        return outs, tuple(_add_at(expert, *pair) for pair in zip(sums, expert_sums, strict=True))

    length = len(arrays[0].sorted)
    outs = tuple(jnp.zeros((length, *x.shape[2:]), x.dtype) for x in shapes[0])
    outs, sums = jax.lax.fori_loop(0, jnp.sum(num_remaining > 0), run_expert, (outs, sums))
    return tuple(_SplitRows(*pair) for pair in zip(batched, outs, strict=True)), sums


def _add_at(index, total, new):
    """`total` with `new` added to `total[index]`."""
    new = new + jax.lax.dynamic_index_in_dim(total, index, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, new, index, 0)
