"""The experts: SwiGLU feed-forward networks with a router row each, in stacks that concatenate.

A *stack* is an `Experts` module whose leaves have leading axes [L, E]. The anchor holds a stack of
one (the public expert), every owner's package holds a stack of one, and `join` makes a merged
model of them. Training hands the layer two stacks, the frozen one and the owner's, so that the
gradient with respect to the second never touches the first.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.kernels.grouped_swiglu import grouped_swiglu
from flexolmo_jax.modeling.layers import Expert, dot, normal
from flexolmo_jax.modeling.router import Router, remember, route
from flexolmo_jax.parallel import collectives

MANY = 64  # tokens from which on it pays to leave some out of an expert's product


@jax.custom_vjp
def swiglu(
    x: jax.Array, weight: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """weight * (silu(x @ gate) * (x @ up)) @ down: what an expert adds to the mixture.

    Its own gradient keeps two arrays of [..., F] instead of the five that JAX would keep, and not
    the expert's answer, which the gradient of `weight` seems to need: <answer, d_out> is taken as
    <hidden, d_out @ down.T>, whose parts the backward pass has at hand.

    Args:
      x: [..., D].
      weight: [...], of the mixture.
      gate, up: [D, F].
      down: [F, D].

    Returns:
      [..., D].
    """
    return weight[..., None] * dot(jax.nn.silu(dot(x, gate)) * dot(x, up), down)


def _swiglu_forward(x, weight, gate, up, down):
    trained = any(matrix.perturbed for matrix in (gate, up, down))
    x, weight, gate, up, down = (leaf.value for leaf in (x, weight, gate, up, down))
    g, u = dot(x, gate), dot(x, up)
    out = weight[..., None] * dot(jax.nn.silu(g) * u, down)
    return out, (x if trained else None, weight, g, u, gate, up, down)


def _swiglu_backward(kept, d_out):
    x, weight, g, u, gate, up, down = kept
    on = jax.nn.sigmoid(g)
    silu = g * on
    hidden = silu * u
    d_answer = dot(d_out, down.T)
    d_weight = jnp.sum(d_answer * hidden, axis=-1, dtype=jnp.float32).astype(weight.dtype)
    d_hidden = weight[..., None] * d_answer
    d_g = d_hidden * u * (on + silu * (1 - on))
    d_u = d_hidden * silu
    d_x = dot(d_g, gate.T) + dot(d_u, up.T)
    if x is None:  # the matrices are frozen
        return d_x, d_weight, None, None, None
    d_down = _outer(hidden, weight[..., None] * d_out)
    return d_x, d_weight, _outer(x, d_g), _outer(x, d_u), d_down


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """[..., A], [..., B] -> [A, B], summed over the rest."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


swiglu.defvjp(_swiglu_forward, _swiglu_backward, symbolic_zeros=True)


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)), for each expert of the stack."""

    def __init__(self, num_layers: int, num_experts: int, width: int, hidden: int, key: jax.Array):
        kg, ku, kd = jax.random.split(key, 3)
        lead = (num_layers, num_experts)
        self.gate = Expert(normal(kg, *lead, width, hidden))  # [L, E, D, F]
        self.up = Expert(normal(ku, *lead, width, hidden))  # [L, E, D, F]
        self.down = Expert(normal(kd, *lead, hidden, width))  # [L, E, F, D]

    def add(
        self, total: jax.Array, x: jax.Array, weights: jax.Array, skip: bool = False
    ) -> jax.Array:
        """total + sum over e of weights[e] * expert_e(x), one expert after the other.

        The order is fixed, and an expert whose weight is 0 adds nothing, even where its own
        weights are NaN; so leaving it in, masked, equals leaving it out, bit for bit.

        Args:
          total: [B, S, D].
          x: [B, S, D].
          weights: [E, B, S].
          skip: leave out experts whose weights are all 0, and of many tokens those whose weight
            is 0, instead of adding nothing.
        """

        def consult(total, expert):
            gate, up, down, weight = expert
            out = swiglu(x, weight, *(w.astype(x.dtype) for w in (gate, up, down)))
            return total + jnp.where(weight[..., None] > 0, out, 0)

        def one(total, expert):
            if not skip:
                return consult(total, expert), None
            if weights[0].size >= MANY:
                return _add_where_used(total, x, *expert), None
            used = jnp.any(expert[-1] > 0)
            return jax.lax.cond(used, consult, lambda total, _: total, total, expert), None

        stack = (self.gate[...], self.up[...], self.down[...], weights.astype(x.dtype))
        return jax.lax.scan(one, total, stack)[0]

    def grouped(self, x: jax.Array, weights: jax.Array, active: int) -> jax.Array:
        """The sum in `add`, over routed rows only; equal up to rounding. Shapes as there."""
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        rows = x.reshape(-1, x.shape[-1])
        out = grouped_swiglu(rows, weights.reshape(len(weights), -1), gate, up, down, active)
        return out.reshape(x.shape)


def _add_where_used(total, x, gate, up, down, weight):
    """One expert's turn in `FeedForward.add`, for the rows that use it, rounded up to an eighth."""
    shape, rows, weight = total.shape, x.reshape(-1, x.shape[-1]), weight.reshape(-1)
    count = len(rows)
    order = jnp.argsort(weight <= 0, stable=True)
    place = jnp.argsort(order)

    def answer(size):
        def compute(total):
            chosen = order[:size]
            out = swiglu(
                rows[chosen], weight[chosen], *(w.astype(x.dtype) for w in (gate, up, down))
            )
            out = jnp.pad(out, ((0, count - size), (0, 0)))[place]
            return total + jnp.where(weight[:, None] > 0, out, 0)

        return compute

    step = -(-count // 8)
    sizes = [*range(step, count, step), count]
    branches = [lambda total: total, *(answer(size) for size in sizes)]
    turn = -(-jnp.sum(weight > 0) // step)
    return jax.lax.switch(turn, branches, total.reshape(rows.shape)).reshape(shape)


class Experts(nnx.Module):
    """A stack of experts: feed-forward networks and their router rows."""

    def __init__(self, config: ModelConfig, num_experts: int, key: jax.Array):
        layers = config.num_layers
        self.feed_forward = FeedForward(layers, num_experts, config.width, config.ffn_width, key)
        self.router = Router(layers, num_experts, config.width)


def join(*stacks: Experts) -> Experts:
    """Merges stacks along the expert axis: no training, no new numbers (paper, section 3.1)."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *stacks)


def select(stack: Experts, indices: list[int]) -> Experts:
    """The stack of the named experts only, in the order given."""
    return jax.tree.map(lambda leaf: leaf[:, jnp.asarray(indices)], stack)


def pad_experts(stack: Experts, multiple: int) -> Experts:
    """The stack with empty experts after its own, until `multiple` divides their number.

    Their weights are 0 and their router bias is -inf, so that no token ever chooses them.
    """
    count = stack.router.bias.shape[1]
    missing = -count % multiple
    if not missing:
        return stack

    def fill(leaf, value=0.0):
        widths = ((0, 0), (0, missing), *((0, 0),) * (leaf.ndim - 2))
        return jnp.pad(leaf, widths, constant_values=value)

    filled = jax.tree.map(fill, stack)
    filled.router.bias[...] = fill(stack.router.bias[...], -jnp.inf)
    return filled


@jax.named_scope("experts")
def mix(
    stacks: tuple[Experts, ...],
    x: jax.Array,
    allowed: jax.Array,
    config: ModelConfig,
    skip: bool = False,
    segments: jax.Array | None = None,
    past: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The mixture of all experts of all stacks.

    `config.expert_compute` says how: "dense" computes every expert for every token and is the
    reference; "grouped" computes an expert where its weight is not 0 (modeling/grouped.py).

    Args:
      stacks: one or more stacks (without the layer axis); experts are numbered through them.
      x: [B, S, D].
      allowed: bool [B, E].
      config: says how many experts are active, whether their weights are renormalised, and whether
        the router remembers.
      skip: do not read experts that no token uses; not for training.
      segments: int32 [B, S], with `config.memory`: documents. Default: one a row.
      past: float32 [E, B], with `config.memory`: as in `remember`. Default: nothing came before.

    Returns:
      [B, S, D]; the router's logits of these tokens alone, float32 [E, B, S]; with `config.memory`
      the next `past`, else None.
    """
    logits = jnp.concatenate([stack.router(x) for stack in stacks])
    active = config.active_experts or len(logits)
    if config.memory is None:
        weights = route(logits, allowed, active, config.renormalize)
    else:
        segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
        past = jnp.zeros_like(logits[..., 0]) if past is None else past
        routing, past = remember(logits, segments, config.memory, past)
        weights = route(routing, allowed, active, config.renormalize)
    total, first = jnp.zeros_like(x), 0
    for stack in stacks:
        last = first + stack.router.bias.shape[0]
        own, feed_forward = weights[first:last], stack.feed_forward
        is_away = collectives.is_expert_parallel(stack)
        apart = is_away or collectives.is_tensor_parallel() or config.expert_compute == "grouped"
        tokens, own = collectives.dispatch_to_experts(x, own) if is_away else (x, own)
        tokens, own = collectives.copy_to_tensor_parallel((tokens, own))
        if config.expert_compute == "grouped":
            out = feed_forward.grouped(tokens, own, min(active, len(own)))
        else:
            out = feed_forward.add(jnp.zeros_like(tokens) if apart else total, tokens, own, skip)
        out = collectives.reduce_from_tensor_parallel(
            collectives.combine_from_experts(out) if is_away else out
        )
        total = total + out if apart else out
        first = last
    return total, logits, past
