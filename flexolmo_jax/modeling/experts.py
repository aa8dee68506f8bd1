"""The mixture of experts: SwiGLU feed-forward networks and a router, in stacks that concatenate.

A *stack* is an `Experts` module whose leaves have leading axes [L, E]. The anchor holds a stack of
one expert (the public one), and every owner's package holds a stack of one. Loading concatenates
them to a merged model (`federation/loading.py`); `join` does so in memory. Training gives the layer
two stacks, the frozen one and the owner's, so that the gradient with respect to the second never
touches the first.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.heads import RANK_BLOCK, LowRankHead
from flexolmo_jax.modeling.kernels.grouped_swiglu import grouped_swiglu
from flexolmo_jax.modeling.kernels.swiglu import swiglu
from flexolmo_jax.modeling.layers import Expert, normal
from flexolmo_jax.modeling.low_rank import (
    FeedForwardRanks,
    LowRankFeedForward,
    LowRankGroups,
    MixedFeedForward,
    materialize,
)
from flexolmo_jax.modeling.narrow import widened
from flexolmo_jax.modeling.router import Router, add_decayed_logits, route
from flexolmo_jax.parallel import collectives
from flexolmo_jax.storage.tensors import leaf_name, named

Module = TypeVar("Module", bound=nnx.Module)


class MoeOutput(NamedTuple):
    out: Float[Array, "B S D"]
    logits: Float[Array, "E B S"] | None  # the router's, before `add_decayed_logits`; float32
    router_state: Float[Array, "E B"] | None  # the next one, with `config.memory`
    weights: Float[Array, "E B S"]  # float32


@jax.named_scope("experts")
def moe(
    x: Float[Array, "B S D"],
    stacks: "tuple[Experts | LayerExperts, ...]",
    allowed: Bool[Array, "B E"],
    config: ModelConfig,
    *,
    segments: Int[Array, "B S"] | None = None,
    router_state: Float[Array, "E B"] | None = None,
    weights: Float[Array, "E B S"] | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> "MoeOutput":
    """The weighted sum of all experts of all stacks.

    `config.expert_compute` chooses the algorithm: "dense" applies every expert to every token and
    is the reference; "grouped" applies an expert where its weight is not 0 (`grouped_swiglu`).

    Args:
      stacks: one or more stacks, without the layer axis; experts are numbered through them.
      allowed: an expert that is not allowed gets weight exactly 0.
      config: the number of active experts, renormalization, and the router memory.
      segments, router_state, lengths: with `config.memory`, as in `add_decayed_logits`. Default:
        one document per sequence, no earlier tokens, and no padding.
      weights: of the experts, if they are known (`evidence.py`); default: the router's.
    """
    logits = None
    active = config.active_experts or allowed.shape[1]
    if weights is None:
        logits = jnp.concatenate([stack.router(x) for stack in stacks])
        weights, router_state = router_weights(
            logits, allowed, config, segments, router_state, lengths
        )
    out, first = jnp.zeros_like(x), 0
    for network, count in (each for stack in stacks for each in _networks(stack)):
        add: Callable = network.add_dense
        if config.expert_compute == "grouped":
            add = functools.partial(network.add_grouped, active=active)
        out = _where_sharded(network, count, add)(out, x, weights[first : first + count])
        first += count
    return MoeOutput(out, logits, router_state, weights)


def router_weights(
    logits: Float[Array, "E B S"],
    allowed: Bool[Array, "B E"],
    config: ModelConfig,
    segments: Int[Array, "B S"] | None = None,
    router_state: Float[Array, "E B"] | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "E B S"], Float[Array, "E B"] | None]:
    """The experts' weights by their routers' logits, and the next state of the router's memory.

    Args:
      segments, router_state, lengths: with `config.memory`, as in `add_decayed_logits`. Default:
        one document per sequence, no earlier tokens, and no padding.
      other arguments: as in `moe`.
    """
    if config.memory is not None:
        segments = jnp.ones(logits.shape[1:], jnp.int32) if segments is None else segments
        router_state = jnp.zeros_like(logits[..., 0]) if router_state is None else router_state
        logits, router_state = add_decayed_logits(
            logits, segments, config.memory, router_state, lengths
        )
    active = config.active_experts or len(logits)
    return route(logits, allowed, active, config.renormalize), router_state


def _networks(
    stack: "Experts | LayerExperts",
) -> "list[tuple[FeedForward | LowRankGroups, int]]":
    """The networks of a stack without the layer axis, each with its number of experts."""
    network, count = stack.feed_forward, stack.router.bias.shape[0]
    assert not isinstance(network, LowRankFeedForward), "with_base has to come first"
    if not isinstance(network, MixedFeedForward):
        return [(network, count)]
    low_rank = network.low_rank.experts_here
    return [(network.full, count - low_rank), (network.low_rank_with_base(), low_rank)]


def _where_sharded(network: "FeedForward | LowRankGroups", count: int, add: Callable) -> Callable:
    """`add(total, x, weights)`, run by the devices that hold `count` experts or shares of them.

    With expert parallelism each device receives all tokens and returns its experts' summand of
    every token (all-gather, reduce-scatter); with tensor parallelism the summands are those of the
    devices' shares of the hidden units (all-reduce). Elsewhere it is `add` itself.
    """
    expert_parallel = collectives.is_expert_parallel(network, count)
    if not expert_parallel and not collectives.is_tensor_parallel():
        return add

    def add_sharded(total, x, weights):
        if expert_parallel:
            x, weights = collectives.dispatch_to_experts(x, weights)
        x, weights = collectives.copy_to_tensor_parallel((x, weights))
        out = add(None, x, weights)
        if expert_parallel:
            out = collectives.combine_from_experts(out)
        return total + collectives.reduce_from_tensor_parallel(out)

    return add_sharded


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)), for each expert of a stack."""

    def __init__(self, num_layers: int, num_experts: int, width: int, hidden: int, key: jax.Array):
        kg, ku, kd = jax.random.split(key, 3)
        lead = (num_layers, num_experts)
        self.gate = Expert(normal(kg, *lead, width, hidden))  # [L, E, D, F]
        self.up = Expert(normal(ku, *lead, width, hidden))  # [L, E, D, F]
        self.down = Expert(normal(kd, *lead, hidden, width))  # [L, E, F, D]

    @property
    def experts_here(self) -> int:
        """How many experts of a layer this device holds."""
        return jax.tree.leaves(self)[0].shape[0]  # also of `Quantized` matrices

    def add_dense(
        self,
        total: Float[Array, "B S D"] | None,
        x: Float[Array, "B S D"],
        weights: Float[Array, "E B S"],
    ) -> Float[Array, "B S D"]:
        """total (None: 0) + sum over e of weights[e] * expert_e(x), expert by expert.

        The order is fixed, and an expert whose weight is 0 adds nothing, even if its own weights
        are NaN; so masking an expert equals leaving it out of the stack, bit for bit.
        """

        def step(total, expert):
            gate, up, down, weight = expert
            out = swiglu(x, weight, *(w.astype(x.dtype) for w in (gate, up, down)))
            return total + jnp.where(weight[..., None] > 0, out, 0), None

        total = jnp.zeros_like(x) if total is None else total
        experts = (self.gate[...], self.up[...], self.down[...], weights.astype(x.dtype))
        return jax.lax.scan(step, total, experts)[0]

    def add_grouped(
        self,
        total: Float[Array, "B S D"] | None,
        x: Float[Array, "B S D"],
        weights: Float[Array, "E B S"],
        active: int,
    ) -> Float[Array, "B S D"]:
        """The sum in `add_dense`, over routed tokens only; equal up to rounding."""
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        tokens = x.reshape(-1, x.shape[-1])
        active = min(active, len(weights))
        out = grouped_swiglu(tokens, weights.reshape(len(weights), -1), gate, up, down, active)
        out = out.reshape(x.shape)
        return out if total is None else total + out


class Ranks(NamedTuple):
    """Of the low-rank heads of an expert; 0 is none."""

    head: int = 0
    evidence: int = 0


NO_HEADS = Ranks()


class LayerExperts(NamedTuple):
    """The parts of `Experts` that every layer has."""

    feed_forward: FeedForward | LowRankGroups | MixedFeedForward
    router: Router

    def gathered(self, config: ModelConfig) -> "LayerExperts":
        """Of one layer, with its matrices all-gathered; expert-parallel experts do not move."""

        def gather(network, count):
            expert_parallel = collectives.is_expert_parallel(network, count)
            return collectives.all_gather_module(network, config, expert_parallel)

        own, count = self.feed_forward, self.router.bias.shape[0]
        if not isinstance(own, MixedFeedForward):
            return LayerExperts(gather(own, count), self.router)
        low_rank = own.low_rank.experts_here
        mixed = MixedFeedForward(gather(own.full, count - low_rank), gather(own.low_rank, low_rank))
        return LayerExperts(mixed, self.router)


class Experts(nnx.Module):
    """A stack of experts: feed-forward networks and their router rows; perhaps low-rank heads.

    `feed_forward` is full, or, with `deltas`, what is added to the public expert's (low_rank.py).
    `head` adds to the logits; `evidence` is a bigram model that the expert is routed by
    (evidence.py).
    """

    feed_forward: FeedForward | LowRankFeedForward | LowRankGroups | MixedFeedForward
    head: LowRankHead
    evidence: LowRankHead

    def __init__(
        self,
        config: ModelConfig,
        num_experts: int,
        key: jax.Array,
        ranks: Ranks = NO_HEADS,
        deltas: FeedForwardRanks | None = None,
    ):
        layers = config.num_layers
        sizes = layers, num_experts, config.width, config.ffn_width
        self.feed_forward = (
            FeedForward(*sizes, key) if deltas is None else LowRankFeedForward(*sizes, deltas, key)
        )
        self.router = Router(layers, num_experts, config.width)
        self.set_heads(config, ranks, jax.random.fold_in(key, 1))

    def set_heads(self, config: ModelConfig, ranks: Ranks, key: jax.Array) -> None:
        """Gives each expert new heads of these ranks, which add nothing yet."""
        num_experts = self.router.bias.shape[1]
        sizes = num_experts, config.width, config.vocab_size
        for name, rank, own_key in zip(Ranks._fields, ranks, jax.random.split(key), strict=True):
            if rank:
                setattr(self, name, LowRankHead(*sizes, rank, own_key))

    @property
    def ranks(self) -> Ranks:
        heads = (getattr(self, name, None) for name in Ranks._fields)
        return Ranks(*(head.rank if head else 0 for head in heads))

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts; the tensors of a package's manifest begin with them."""
        heads = (name for name, rank in self.ranks._asdict().items() if rank)
        return ("feed_forward", "router", *heads)

    @property
    def deltas(self) -> FeedForwardRanks | None:
        """The ranks of low-rank experts, as packages hold them; None of others."""
        own = self.feed_forward
        return own.ranks if isinstance(own, LowRankFeedForward) else None

    def of_layers(self) -> LayerExperts:
        """What a scan over the layers slices."""
        assert not isinstance(self.feed_forward, LowRankFeedForward), "with_base has to come first"
        return LayerExperts(self.feed_forward, self.router)


def with_parts(like: Module, **parts: nnx.Module | None) -> Module:
    """A module with other parts; None leaves one out. `like` is not changed."""
    changed = jax.tree.map(lambda leaf: leaf, like)
    for name, part in parts.items():
        if part is not None:
            setattr(changed, name, part)
        elif hasattr(changed, name):
            delattr(changed, name)
    return changed


def with_base(stack: Experts, public: Experts) -> Experts:
    """The stack as the network computes it: low-rank experts get what they are deltas of."""
    if not isinstance(stack.feed_forward, LowRankFeedForward):
        return stack
    groups = LowRankGroups([stack.feed_forward], public.feed_forward)
    return with_parts(stack, feed_forward=groups)


def with_full_feed_forward(stack: Experts, public: Experts) -> Experts:
    """The stack with full feed-forward networks, as `materialize` and `widened` make them."""
    own = stack.feed_forward
    make = (
        materialize(public.feed_forward, own)
        if isinstance(own, LowRankFeedForward)
        else (widened(own, public.feed_forward))
    )
    return with_parts(stack, feed_forward=make)


def with_same_parts(stacks: Sequence[Experts], keep_low_rank: bool = False) -> list[Experts]:
    """The stacks with the same parts, so that they can be concatenated.

    A missing head is one of zeros, which adds nothing. A head gets zero columns up to the rank of
    the widest, and to a multiple of RANK_BLOCK, so that no pass over the network has to pad it. A
    low-rank feed-forward network becomes a full one, beside that of the first stack, the public
    one, unless it is kept; a narrow one gets units of zeros. Leaves may be on disk or on the host;
    only heads that are padded are read.
    """
    stacks = [
        stack if keep_low_rank and stack.deltas else with_full_feed_forward(stack, stacks[0])
        for stack in stacks
    ]
    widest = map(max, zip(*(stack.ranks for stack in stacks), strict=True))
    ranks = Ranks(*(-(-rank // RANK_BLOCK) * RANK_BLOCK for rank in widest))
    return [_with_ranks(stack, ranks, like=stacks) for stack in stacks]


def _with_ranks(stack: Experts, ranks: Ranks, like: Sequence[Experts]) -> Experts:
    for name, rank in ranks._asdict().items():
        if getattr(stack.ranks, name) != rank:
            given = next(getattr(x, name) for x in like if getattr(x.ranks, name))
            own = getattr(stack, name, None)
            head = _padded_head(own, given, rank, stack.router.bias.shape[1])
            stack = with_parts(stack, **{name: head})
    return stack


def _padded_head(
    own: LowRankHead | None, like: LowRankHead, rank: int, num_experts: int
) -> LowRankHead:
    """A head of this rank that gives what `own` gives, nothing by default; `like` has the sizes."""
    sizes = num_experts, like.a.shape[2], like.b.shape[-1], rank
    head = jax.eval_shape(lambda key: LowRankHead(*sizes, key), jax.random.key(0))

    given = {} if own is None else named(own)

    def pad(path, x):
        zeros = np.zeros(x.shape, np.float32)
        if given:
            values = np.asarray(given[leaf_name(path)])
            zeros[tuple(map(slice, values.shape))] = values
        return zeros

    return jax.tree_util.tree_map_with_path(pad, head)


def join(*stacks: Experts) -> Experts:
    """Concatenates stacks along the expert axis, without training (paper, section 3.1)."""
    same = with_same_parts(stacks)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *same)


def select(stack: Experts, indices: list[int]) -> Experts:
    """The stack of the experts at `indices`, in that order."""
    return jax.tree.map(lambda leaf: leaf[:, np.asarray(indices)], stack)


def split(experts: Experts) -> list[Experts]:
    """The experts of a merged model as stacks of one, in order: the inverse of joining."""

    def of_one(tree: Any) -> list[Any]:
        count = jax.tree.leaves(tree)[0].shape[1]
        return [jax.tree.map(lambda leaf, e=e: leaf[:, e : e + 1], tree) for e in range(count)]

    mixed = experts.feed_forward
    if not isinstance(mixed, MixedFeedForward):
        return of_one(experts)
    networks = [one for kind in (mixed.full, *mixed.low_rank.groups) for one in of_one(kind)]
    rest = of_one(with_parts(experts, feed_forward=None))
    pairs = zip(rest, networks, strict=True)
    return [with_parts(one, feed_forward=network) for one, network in pairs]


def pad_experts(stack: Experts, multiple: int) -> Experts:
    """Appends padding experts to the stack until `multiple` divides their number.

    Their weights are 0 and their router bias is -inf, so no token is ever routed to them.
    """
    count = stack.router.bias.shape[1]
    missing = -count % multiple
    if not missing:
        return stack

    def pad(leaf, value=0.0):
        widths = ((0, 0), (0, missing), *((0, 0),) * (leaf.ndim - 2))
        return jnp.pad(leaf, widths, constant_values=value)

    padded = jax.tree.map(pad, stack)
    padded.router.bias[...] = pad(stack.router.bias[...], -jnp.inf)
    return padded
