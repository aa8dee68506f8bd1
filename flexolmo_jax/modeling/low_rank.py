"""Low-rank experts: feed-forward networks that differ from the public one by products a b.

FlexMoRE (Pedersen et al., 2026) makes an expert of FlexOlmo this way. Such an expert is a fraction
of a full one on disk, and it reuses the public network's products: the experts of a stack need
x @ gate and x @ up once for all of them, and one product with `down` for their sum.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flexolmo_jax.modeling.kernels.quantized import dot
from flexolmo_jax.modeling.layers import Expert, normal
from flexolmo_jax.parallel import collectives
from flexolmo_jax.storage.on_disk import WithDelta
from flexolmo_jax.storage.tensors import leaf_name, named


class FeedForwardRanks(NamedTuple):
    """Of the deltas of a low-rank expert's three matrices; each at least 1."""

    gate: int
    up: int
    down: int


class LowRankMatrix(nnx.Module):
    """a b of rank R, for each expert of a stack; it is 0 at first."""

    def __init__(
        self, num_layers: int, num_experts: int, rows: int, columns: int, rank: int, key: jax.Array
    ):
        lead = (num_layers, num_experts)
        self.a = Expert(normal(key, *lead, rows, rank, std=rows**-0.5))  # [L, E, rows, R]
        self.b = Expert(jnp.zeros((*lead, rank, columns)))  # [L, E, R, columns]


class LowRankFeedForward(nnx.Module):
    """What is added to gate, up and down of the public expert, for each expert of a stack.

    It is what packages hold and what is trained; `LowRankGroups` compute with it. Ranks that differ
    by layer are padded with zero columns.
    """

    def __init__(
        self, num_layers: int, num_experts: int, width: int, hidden: int,
        ranks: FeedForwardRanks, key: jax.Array,
    ):  # fmt: skip
        kg, ku, kd = jax.random.split(key, 3)
        lead = (num_layers, num_experts)
        self.gate = LowRankMatrix(*lead, width, hidden, ranks.gate, kg)
        self.up = LowRankMatrix(*lead, width, hidden, ranks.up, ku)
        self.down = LowRankMatrix(*lead, hidden, width, ranks.down, kd)

    @property
    def ranks(self) -> FeedForwardRanks:
        return FeedForwardRanks(*(x.a.shape[-1] for x in (self.gate, self.up, self.down)))

    @property
    def experts_here(self) -> int:
        """How many experts of a layer this device holds: all of them."""
        return jax.tree.leaves(self)[0].shape[0]  # also of `Quantized` matrices

    def factors(self, hidden: int, dtype: Any) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """a and b of gate, up and down; with tensor parallelism, for this device's hidden units."""
        gate, up, down = (
            collectives.copy_to_tensor_parallel(
                (matrix.a[...].astype(dtype), matrix.b[...].astype(dtype))
            )
            for matrix in (self.gate, self.up, self.down)
        )
        own = collectives.local_hidden_units
        return (
            (gate[0], own(gate[1], hidden, axis=-1)),
            (up[0], own(up[1], hidden, axis=-1)),
            (own(down[0], hidden, axis=-2), down[1]),
        )


class LowRankGroups(nnx.Module):
    """down(silu(gate(x)) * up(x)), each matrix the base's plus a b, for low-rank experts.

    The experts of a group have the same ranks. Zero columns would make them one stack, but a longer
    sum is another sum in its last bits: an expert's output may not depend on others' ranks.
    """

    base: Any  # the public `FeedForward`, a stack of one; only where the network computes

    def __init__(self, groups: Sequence[LowRankFeedForward], base: Any = None):
        for number, group in enumerate(groups):
            setattr(self, f"group{number}", group)
        if base is not None:
            self.base = base

    @property
    def groups(self) -> list[LowRankFeedForward]:
        """The stacks, in the order of the experts."""
        names = itertools.takewhile(
            lambda name: hasattr(self, name), (f"group{i}" for i in itertools.count())
        )
        return [getattr(self, name) for name in names]

    @property
    def experts_here(self) -> int:
        """How many experts of a layer this device holds: all of them."""
        return sum(group.experts_here for group in self.groups)

    def with_base(self, base: Any) -> "LowRankGroups":
        """The same groups beside a base."""
        return LowRankGroups(self.groups, base)

    def add_dense(
        self,
        total: Float[Array, "B S D"] | None,
        x: Float[Array, "B S D"],
        weights: Float[Array, "E B S"],
    ) -> Float[Array, "B S D"]:
        """total (None: 0) + sum over e of weights[e] * expert_e(x), as `FeedForward.add_dense`.

        Equal to the full experts of `materialize`, up to rounding. An expert whose weight is 0 adds
        nothing, even if its own weights are NaN, and where all are 0 `total` stays as it is; so
        masking experts equals leaving them out of the stack, bit for bit.
        """
        total = jnp.zeros_like(x) if total is None else total
        gate, up, down = (
            jax.tree.map(lambda leaf: leaf[0], getattr(self.base, name)[...]).astype(x.dtype)
            for name in FeedForwardRanks._fields
        )
        of_gate, of_up = dot(x, gate), dot(x, up)

        def step(sums, expert):
            (gate_a, gate_b), (up_a, up_b), (down_a, down_b), weight = expert
            g = of_gate + dot(dot(x, gate_a), gate_b)
            u = of_up + dot(dot(x, up_a), up_b)
            weight = weight[..., None]
            hidden = weight * (jax.nn.silu(g) * u)
            more = hidden, dot(dot(hidden, down_a), down_b)
            added = (
                old + jnp.where(weight > 0, new, 0) for old, new in zip(sums, more, strict=True)
            )
            return tuple(added), None

        sums, first = (jnp.zeros_like(of_gate), jnp.zeros_like(x)), 0
        for group in self.groups:
            last = first + group.experts_here
            own_weights = weights[first:last].astype(x.dtype)
            factors = group.factors(of_gate.shape[-1], x.dtype)
            sums, _ = jax.lax.scan(step, sums, (*factors, own_weights))
            first = last
        hidden, out = sums
        is_used = jnp.any(weights > 0, axis=0)[..., None]
        return jnp.where(is_used, total + (dot(hidden, down) + out), total)

    def add_grouped(
        self,
        total: Float[Array, "B S D"] | None,
        x: Float[Array, "B S D"],
        weights: Float[Array, "E B S"],
        active: int,
    ) -> Float[Array, "B S D"]:
        """`add_dense`: nearly all of its cost is the base's, which every token needs."""
        del active
        return self.add_dense(total, x, weights)


class MixedFeedForward(nnx.Module):
    """Full experts, the public one first, and after them low-rank ones, of one merged model."""

    def __init__(self, full: Any, low_rank: LowRankGroups):
        self.full = full  # a `FeedForward`
        # With a base of their own where the full experts are on several devices, each on one: every
        # device computes the low-rank experts of its own tokens.
        self.low_rank = low_rank

    def low_rank_with_base(self) -> LowRankGroups:
        """The low-rank experts of one layer, beside the public one."""
        if hasattr(self.low_rank, "base"):
            return self.low_rank
        return self.low_rank.with_base(jax.tree.map(lambda leaf: leaf[:1], self.full))


def materialize(base: Any, deltas: LowRankFeedForward) -> Any:
    """A full `FeedForward` of one expert: the base's matrices plus the deltas.

    Args:
      base: the public expert's, [L, 1, ...]; in memory or on disk.
      deltas: of one expert. If all leaves are arrays of JAX, so is the result, float32; else it is
        read in slices (`storage.on_disk.WithDelta`).
    """
    own = named({name: getattr(deltas, name) for name in FeedForwardRanks._fields})

    def add(path, matrix):
        name = leaf_name(path)
        a, b = own[f"{name}.a"], own[f"{name}.b"]
        if not all(isinstance(x, jax.Array) for x in (matrix, a, b)):
            return WithDelta(matrix, a, b)
        matrix, a, b = (x.astype(jnp.float32) for x in (matrix, a, b))
        return matrix + jnp.matmul(a, b, precision="highest")

    return jax.tree_util.tree_map_with_path(add, base)


def truncated_svd(
    delta: np.ndarray, rank: int | None, energy: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """The product a b nearest to a matrix (Eckart and Young, 1936); each has half of every value.

    Args:
      delta: [I, O], float64.
      rank: R, or None: the smallest that keeps `energy`, at least 1.
      energy: share of the squared Frobenius norm, in (0, 1].

    Returns:
      a [I, R] and b [R, O], float32; and the share that they keep.
    """
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    kept = np.cumsum(values**2)
    if rank is None:
        rank = min(1 + int(np.sum(kept < energy * kept[-1])), len(values))
    root = np.sqrt(values[:rank])
    a, b = left[:, :rank] * root, root[:, None] * right[:rank]
    share = float(kept[rank - 1] / kept[-1]) if kept[-1] else 1.0
    return a.astype(np.float32), b.astype(np.float32), share
