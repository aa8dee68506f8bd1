"""The network as one compiled program over stacked weights, for an engine on a GPU, TPU or mesh.

The devices of a mesh share the slots of an engine, as they share the sequences of a batch. All of
them read each prompt, so that every one has what its own slots need of it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.inference.layerwise import Reading, Scores, some_allowed
from flexolmo_jax.inference.sequences import Tokens
from flexolmo_jax.modeling.decode_state import DecodeState, EvidenceState, KVCache
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone, forward_step, output_logits
from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import BATCH, num_shards, specs_of


class Stacked(NamedTuple):
    """What is known of the tokens that were read, of all layers; donated to calls.

    Attributes:
      cache: keys and values.
      router_state: with `config.memory`; float32 [L, E, B].
      evidence: with `config.evidence`.
    """

    cache: KVCache
    router_state: Any
    evidence: EvidenceState | None


class CompiledNetwork:
    """The weights of a model, on the devices of a mesh or on one, and a program that reads tokens.

    What `layerwise.Network` does on a CPU, with the same arguments and results. With several
    processes, all of them make the same calls.

    Args:
      backbone, experts, config: the model.
      num_experts: of the stack; those after them pad it.
      mesh: the devices of the weights, if there are several.

    Attributes:
      rows: how many devices share a batch, whose size is a multiple of it.
    """

    def __init__(
        self,
        backbone: Backbone,
        experts: Experts,
        config: ModelConfig,
        num_experts: int,
        mesh: Mesh | None,
    ):
        self.config, self.num_experts = config, num_experts
        self._weights, self._mesh = (backbone, experts), mesh
        self._padding = experts.router.bias.shape[1] - num_experts
        self.rows = 1 if mesh is None else num_shards(mesh)

    def empty(self, batch: int, length: int) -> Stacked:
        """Of no tokens, with room for `length` in each sequence; a batch of 1 is on all devices."""
        batch = self.rows if batch == 1 else batch
        with placement.use_mesh(self._mesh):
            experts = self.num_experts + self._padding
            return _empty(self.config, experts, batch, length, self._mesh)

    def place(self, batch: Stacked, one: Stacked, row: int, length: int) -> Stacked:
        """As `layerwise.Network.place`."""
        with placement.use_mesh(self._mesh):
            return _place(batch, one, np.int32(row), config=self.config, mesh=self._mesh)

    def __call__(
        self, tokens: Tokens, sequences: Stacked, following: np.ndarray | None = None
    ) -> Reading:
        """Reads the next tokens; arguments as of `layerwise.Network`."""
        batch = len(tokens.ids)
        tokens = tokens._replace(allowed=np.pad(tokens.allowed, ((0, 0), (0, self._padding))))
        repeat = self.rows if batch == 1 else 1
        rows = (tokens, following)
        rows = jax.tree.map(lambda x: np.repeat(np.asarray(x), repeat, axis=0), rows)
        tokens, following = placement.put_batch(rows, self._mesh)
        with placement.use_mesh(self._mesh):
            logits, sequences, shares, scores = _read(
                self._weights, tokens, sequences, following, config=self.config, mesh=self._mesh
            )
        logits, shares, scores = jax.tree.map(_local, (logits, shares, scores))
        if batch == 1:
            logits, shares = logits[:1], shares[:, :1]
        return Reading(logits, sequences, np.array(shares[: self.num_experts]), scores)


def _parts(config: ModelConfig, cache: Any, router_state: Any, evidence: Any) -> Stacked:
    """Of these, the parts that sequences of a model have."""
    return Stacked(
        KVCache(cache, cache),
        router_state if config.memory else None,
        EvidenceState(*evidence) if config.evidence else None,
    )


def _specs(config: ModelConfig) -> Stacked:
    return _parts(config, P(None, *BATCH), P(None, None, *BATCH), (P(None, *BATCH), BATCH))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty(config: ModelConfig, experts: int, batch: int, length: int, mesh) -> Stacked:
    def local():
        own = batch if mesh is None else batch // num_shards(mesh)
        return Stacked(
            KVCache.empty(config, own, length, jnp.dtype(config.dtype)),
            jnp.zeros((config.num_layers, experts, own)) if config.memory else None,
            EvidenceState.empty(experts, own) if config.evidence else None,
        )

    return placement.shard_map(local, mesh, (), _specs(config))()


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=0)
def _place(batch, one, row, *, config: ModelConfig, mesh) -> Stacked:
    def local(batch, one, row):
        own = batch.cache.keys.shape[1]
        index = row - collectives.first_sequence(own)
        is_here = (index >= 0) & (index < own)
        index = jnp.clip(index, 0, own - 1)

        def put(axis, old, new):
            kept = jax.lax.dynamic_slice_in_dim(old, index, 1, axis)
            new = jnp.where(is_here, new, kept)
            return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis)

        axes = _parts(config, 1, 2, (1, 0))  # of the sequences
        return jax.tree.map(put, axes, batch, one)

    specs = _specs(config)
    return placement.shard_map(local, mesh, (specs, specs, P()), specs)(batch, one, row)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=2)
def _read(weights, tokens: Tokens, sequences: Stacked, following, *, config: ModelConfig, mesh):
    local = functools.partial(_read_local, config=config)
    specs = (specs_of(weights, mesh), BATCH, _specs(config), BATCH)
    outs = (P(), _specs(config), P(), P())
    return placement.shard_map(local, mesh, specs, outs)(weights, tokens, sequences, following)


def _read_local(weights, tokens: Tokens, sequences: Stacked, following, *, config: ModelConfig):
    backbone, experts = weights
    last = tokens.last
    positions = tokens.start[:, None] + jnp.arange(tokens.ids.shape[1])
    cache, router_state, evidence = sequences
    out, state = forward_step(
        backbone, (experts,), tokens.ids,
        DecodeState(cache, None, positions, None, router_state, evidence, last + 1), config,
        allowed=some_allowed(tokens.allowed),
    )  # fmt: skip
    rows = jnp.arange(len(last))
    heads = functools.partial(output_logits, backbone, (experts,), config=config)
    logits = heads(hidden=out.hidden[rows, last], weights=out.weights[:, rows, last])
    shares = jnp.where(tokens.lengths > 0, out.mean_weights[:, rows, last], 0)
    scores = None
    if following is not None:  # of one sequence, which all devices have
        own = heads(hidden=out.hidden[:1], weights=out.weights[:, :1])
        scores = Scores.of(own, following[:1])
    logits, shares = (
        collectives.all_gather_batch(x, axis) for x, axis in ((logits, 0), (shares, 1))
    )
    return logits, Stacked(state.cache, state.router_state, state.evidence), shares, scores


def _local(x: jax.Array) -> jax.Array:
    """An array that is whole on each device, on one of this process."""
    return x.addressable_data(0)
