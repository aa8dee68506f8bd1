"""Expert compute that works on routed rows only: sort tokens by expert, then one expert at a time.

The FLOPs are those of the active experts, plus what rounds each expert's rows up to a multiple of
`STEP`. On TPU and GPU the products are JAX's ragged ones; on CPU, where those cost E times as
much, a loop over experts takes blocks of rows, with a gradient of its own.
"""

import functools

import jax
import jax.numpy as jnp

from flexolmo_jax import sharding

BLOCK = 256  # rows of an expert that are worked on at a time
STEP = 32  # the last block of an expert is as many rows as it needs, rounded up to this


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
    rows = _products(rows, gate, up, down, sizes)
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


def _products(rows, gate, up, down, sizes):
    """swiglu of sorted rows [R, D] by their experts; rows of nobody come out as anything."""
    if sharding.platform() == "cpu":
        return _blocks(rows, gate, up, down, sizes)
    ragged = functools.partial(jax.lax.ragged_dot, group_sizes=sizes.astype(jnp.int32))
    return ragged(jax.nn.silu(ragged(rows, gate)) * ragged(rows, up), down)


@jax.custom_vjp
def _blocks(rows, gate, up, down, sizes):
    def compute(rows, gate, up, down):
        return (((jax.nn.silu(rows @ gate) * (rows @ up)) @ down,), ())

    return _over_experts(compute, (rows,), (gate, up, down), sizes)[0][0]


def _blocks_forward(rows, gate, up, down, sizes):
    def compute(rows, gate, up, down):
        g, u = rows @ gate, rows @ up
        return ((jax.nn.silu(g) * u) @ down, g, u), ()

    (out, g, u), _ = _over_experts(compute, (rows,), (gate, up, down), sizes)
    return out, (rows, g, u, gate, up, down, sizes)


def _blocks_backward(kept, d_out):
    rows, g, u, gate, up, down, sizes = kept

    def compute(rows, g, u, d_out, gate, up, down):
        on = jax.nn.sigmoid(g)
        silu = g * on
        d_hidden = d_out @ down.T
        d_g = d_hidden * u * (on + silu * (1 - on))
        d_u = d_hidden * silu
        d_rows = d_g @ gate.T + d_u @ up.T
        return (d_rows,), (rows.T @ d_g, rows.T @ d_u, (silu * u).T @ d_out)

    (d_rows,), d_weights = _over_experts(compute, (rows, g, u, d_out), (gate, up, down), sizes)
    d_rows = jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(sizes), d_rows, 0)
    return d_rows, *d_weights, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _over_experts(compute, arrays, weights, sizes):
    """Runs `compute(*rows of a block, *weights of its expert)` over all rows that an expert has.

    An expert's last block may reach into rows of the next; in `arrays` those are set to 0 first,
    and what is written there is overwritten when their own expert comes, as experts come in order.

    Args:
      compute: returns rows [m, ...], and addends that are summed for each expert.
      arrays: [R, ...], sorted by expert.
      weights: [E, ...] each.
      sizes: int [E], rows of each expert.

    Returns:
      the rows [R, ...] and the sums [E, ...].
    """
    count = len(arrays[0])
    arrays = tuple(jnp.pad(x, ((0, BLOCK), *((0, 0),) * (x.ndim - 1))) for x in arrays)

    def padded(rows, weights, size):
        """The first `size` of BLOCK rows, computed; the results filled up with zeros."""
        out, addends = compute(*(x[:size] for x in rows), *weights)
        return tuple(jnp.pad(x, ((0, BLOCK - size), (0, 0))) for x in out), addends

    shapes = jax.eval_shape(
        lambda: padded(tuple(x[:BLOCK] for x in arrays), tuple(w[0] for w in weights), BLOCK)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    lengths = range(STEP, BLOCK + 1, STEP)
    branches = [lambda *_: zeros] + [functools.partial(padded, size=m) for m in lengths]

    def expert(carry, one):
        outs, start = carry
        weights, size = one

        def block(number, state):
            outs, sums = state
            at = start + number * BLOCK
            left = size - number * BLOCK
            is_own = jnp.arange(BLOCK) < left
            rows = tuple(jax.lax.dynamic_slice_in_dim(x, at, BLOCK) for x in arrays)
            rows = tuple(jnp.where(is_own[:, None], x, 0) for x in rows)
            branch = -(-jnp.minimum(left, BLOCK) // STEP)
            made, addends = jax.lax.switch(branch, branches, rows, weights)
            outs = tuple(
                jax.lax.dynamic_update_slice_in_dim(out, new, at, 0)
                for out, new in zip(outs, made, strict=True)
            )
            return outs, jax.tree.map(jnp.add, sums, addends)

        outs, sums = jax.lax.fori_loop(0, -(-size // BLOCK), block, (outs, zeros[1]))
        return (outs, start + size), sums

    outs = tuple(jnp.zeros((count + BLOCK, *x.shape[1:]), x.dtype) for x in shapes[0])
    (outs, _), sums = jax.lax.scan(expert, (outs, 0), (weights, sizes))
    return tuple(x[:count] for x in outs), sums
