"""Expert compute that works on routed rows only: sort tokens by expert, then one expert at a time.

On TPU and GPU the products are JAX's ragged ones. On CPU those cost E times as much. There a loop
takes blocks of each expert's rows; it copies an expert's weights, which costs as much as a few
hundred rows. So where experts have fewer rows than that, and about as many each, one batched
product takes the first rows of all of them, and the loop what is left.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flexolmo_jax.parallel import collectives

BLOCKS = (128, 256, 512)  # rows of an expert that the loop takes at a time: at most the mean
STEPS = 8  # an expert's last block is as many rows as it needs, rounded up to an eighth of a block
FEW = 512  # rows an expert, below which the batched product is worth its rounding up
SPARE = 32  # rows an expert that it takes beyond the mean
LEFT = 1 / 8  # of the rows that may be left to the loop for it to be worth it


def grouped_swiglu(
    x: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, active: int
) -> jax.Array:
    """sum over e of weights[e] * swiglu_e(x), computing only where the weight is not 0.

    Args:
      x: [T, D].
      weights: float32 [E, T]; at most `active` of a token are not 0.
      gate, up: [E, D, F].
      down: [E, F, D].
      active: A.

    Returns:
      [T, D].
    """
    num_experts = len(gate)
    weights, experts = jax.lax.top_k(weights.T, min(active, num_experts))  # [T, A] each
    experts = jnp.where(weights > 0, experts, num_experts)  # nobody's: they come last
    order = jnp.argsort(experts.reshape(-1), stable=True)
    place = jnp.argsort(order).reshape(experts.shape)  # [T, A]: the sorted row of each pair
    sizes = jnp.bincount(experts.reshape(-1), length=num_experts)
    rows = _take_sorted(x, order, place)
    rows = _products(rows, gate, up, down, sizes, most=len(x))
    out = jnp.where(weights[..., None] > 0, _put_back(rows, order, place), 0)
    return jnp.sum(out * weights[..., None].astype(x.dtype), axis=1)


# Sorting rows and putting them back are each other's gradients: gathers both, where JAX would make
# one of them a scatter.


@jax.custom_vjp
def _take_sorted(x, order, place):
    """[T, D] -> [T * A, D], by expert."""
    return x[order // place.shape[1]]


_take_sorted.defvjp(
    lambda x, order, place: (_take_sorted(x, order, place), place),
    lambda place, d: (jnp.sum(d[place], axis=1), None, None),
)


@jax.custom_vjp
def _put_back(rows, order, place):
    """[T * A, D] -> [T, A, D], by token."""
    return rows[place]


_put_back.defvjp(
    lambda rows, order, place: (rows[place], order),
    lambda order, d: (d.reshape(-1, d.shape[-1])[order], None, None),
)


def _products(rows, gate, up, down, sizes, most: int):
    """swiglu of sorted rows [R, D] by their experts; rows of nobody come out as anything.

    Args:
      sizes: int [E], rows of each expert.
      most: rows that an expert can have.
    """
    if collectives.platform() == "cpu":
        return _on_cpu(rows, gate, up, down, sizes, most)
    ragged = functools.partial(jax.lax.ragged_dot, group_sizes=sizes.astype(jnp.int32))
    return ragged(jax.nn.silu(ragged(rows, gate)) * ragged(rows, up), down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _on_cpu(rows, gate, up, down, sizes, most):
    def compute(rows, gate, up, down):
        return (((jax.nn.silu(rows @ gate) * (rows @ up)) @ down,), ())

    places = _Places.of(sizes, len(rows), most)
    (out,), _ = _over_experts(compute, (places.cut(rows),), (gate, up, down), places)
    return places.sorted(out)


def _forward(rows, gate, up, down, sizes, most):
    def compute(rows, gate, up, down):
        g, u = rows @ gate, rows @ up
        return ((jax.nn.silu(g) * u) @ down, g, u), ()

    places = _Places.of(sizes, len(rows), most)
    (out, g, u), _ = _over_experts(compute, (places.cut(rows),), (gate, up, down), places)
    return places.sorted(out), (rows, g, u, gate, up, down, sizes)


def _backward(most, kept, d_out):
    rows, g, u, gate, up, down, sizes = kept
    places = _Places.of(sizes, len(rows), most)

    def compute(rows, g, u, d_out, gate, up, down):
        on = jax.nn.sigmoid(g)
        silu = g * on
        d_hidden = d_out @ down.T
        d_g = d_hidden * u * (on + silu * (1 - on))
        d_u = d_hidden * silu
        d_rows = d_g @ gate.T + d_u @ up.T
        return (d_rows,), (rows.T @ d_g, rows.T @ d_u, (silu * u).T @ d_out)

    arrays = (places.cut(rows), g, u, places.cut(d_out))
    (d_rows,), d_weights = _over_experts(compute, arrays, (gate, up, down), places)
    d_rows = jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(sizes), places.sorted(d_rows), 0)
    return d_rows, *d_weights, None


_on_cpu.defvjp(_forward, _backward)


class _Cut(NamedTuple):
    """Rows of all experts, in two parts that overlap; a row counts where `_Places` says it is."""

    first: jax.Array  # [E, C, ...]: of each expert; the rest of C is 0
    rest: jax.Array  # [R + block, ...]: sorted by expert


class _Places(NamedTuple):
    """Which rows are whose, and where they are worked on."""

    starts: jax.Array  # int [E]
    sizes: jax.Array  # int [E]
    together: jax.Array  # bool: the batched product takes C rows of each expert; else none
    numbers: jax.Array  # int [E, C]: sorted rows that it takes
    at: tuple[jax.Array, jax.Array]  # int [R] each: of a sorted row, its expert and place there
    block: int  # rows that the loop takes at a time

    @classmethod
    def of(cls, sizes: jax.Array, rows: int, most: int) -> "_Places":
        mean = rows / len(sizes)
        block = max(size for size in BLOCKS if size <= max(mean, BLOCKS[0]))
        capacity = 0 if mean >= FEW else -(-int(mean + SPARE) // 16) * 16
        capacity = most if mean == most else min(capacity, most)
        ends = jnp.cumsum(sizes)
        starts = ends - sizes
        together = jnp.sum(jnp.maximum(sizes - capacity, 0)) <= LEFT * jnp.sum(sizes)
        numbers = starts[:, None] + jnp.arange(capacity)
        row = jnp.arange(rows)
        expert = jnp.minimum(jnp.searchsorted(ends, row, side="right"), len(sizes) - 1)
        return cls(starts, sizes, together, numbers, (expert, row - starts[expert]), block)

    @property
    def taken(self) -> jax.Array:
        """Rows of each expert that the batched product takes."""
        return jnp.where(self.together, self.numbers.shape[1], 0)

    def cut(self, rows: jax.Array) -> _Cut:
        """Sorted rows [R, ...], where they are worked on."""
        own = jnp.arange(self.numbers.shape[1]) < self.sizes[:, None]
        first = jnp.where(own[..., None], rows[jnp.minimum(self.numbers, len(rows) - 1)], 0)
        return _Cut(first, jnp.pad(rows, ((0, self.block), (0, 0))))

    def sorted(self, rows: _Cut) -> jax.Array:
        """[R, ...]."""
        expert, place = self.at
        capacity = self.numbers.shape[1]
        if not capacity:
            return rows.rest[: len(expert)]
        first = rows.first[expert, jnp.minimum(place, capacity - 1)]
        return jnp.where((place < self.taken)[:, None], first, rows.rest[: len(expert)])


def _over_experts(compute, arrays: tuple[_Cut, ...], weights, places: _Places):
    """Runs `compute(*rows, *weights of their expert)` over all rows that an expert has.

    In the loop, an expert's last block may reach into rows of the next; in `arrays` those are set
    to 0 first, and what is written there is overwritten when their own expert comes, as experts
    come in order.

    Args:
      compute: returns rows [m, ...], and addends that are summed for each expert.
      arrays: rows.
      weights: [E, ...] each.
      places: of the rows.

    Returns:
      the rows, and the sums [E, ...].
    """

    def together():
        return jax.vmap(compute)(*(x.first for x in arrays), *weights)

    shapes = jax.eval_shape(together)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    has_any = places.numbers.shape[1] > 0
    first, sums = jax.lax.cond(places.together, together, zeros) if has_any else zeros()

    def padded(rows, weights, size):
        """The first `size` of a block's rows, computed; the results filled up with zeros."""
        out, addends = compute(*(x[:size] for x in rows), *weights)
        return tuple(jnp.pad(x, ((0, block - size), (0, 0))) for x in out), addends

    block, step = places.block, places.block // STEPS
    branches = [functools.partial(padded, size=m) for m in range(step, block + 1, step)]
    left = jnp.maximum(places.sizes - places.taken, 0)
    order = jnp.argsort(left == 0, stable=True)  # those that have rows left come first

    def expert(number, carry):
        here = order[number]
        outs, sums = carry
        own = tuple(jax.lax.dynamic_index_in_dim(w, here, keepdims=False) for w in weights)
        start, count = places.starts[here] + places.taken, left[here]

        def one(number, carry):
            outs, sums = carry
            at = start + number * block
            is_own = jnp.arange(block) < count - number * block
            rows = tuple(jax.lax.dynamic_slice_in_dim(x.rest, at, block) for x in arrays)
            rows = tuple(jnp.where(is_own[:, None], x, 0) for x in rows)
            branch = -(-jnp.minimum(count - number * block, block) // step) - 1
            made, addends = jax.lax.switch(branch, branches, rows, own)
            outs = tuple(
                jax.lax.dynamic_update_slice_in_dim(out, new, at, 0)
                for out, new in zip(outs, made, strict=True)
            )
            return outs, jax.tree.map(jnp.add, sums, addends)

        # Sums of its own, since adding to a part of a large array is slow here.
        nothing = tuple(jnp.zeros(x.shape[1:], x.dtype) for x in sums)
        outs, of_expert = jax.lax.fori_loop(0, -(-count // block), one, (outs, nothing))
        return outs, tuple(_add_at(here, *pair) for pair in zip(sums, of_expert, strict=True))

    length = len(arrays[0].rest)
    outs = tuple(jnp.zeros((length, *x.shape[2:]), x.dtype) for x in shapes[0])
    outs, sums = jax.lax.fori_loop(0, jnp.sum(left > 0), expert, (outs, sums))
    return tuple(_Cut(*both) for both in zip(first, outs, strict=True)), sums


def _add_at(index, total, new):
    """`total` with `new` added to its part [index]."""
    new = new + jax.lax.dynamic_index_in_dim(total, index, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, new, index, 0)
