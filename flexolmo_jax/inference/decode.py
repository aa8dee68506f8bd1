"""Generation on accelerators and meshes: one prefill, then one compiled loop over new tokens."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.inference.continuations import Continuations, Options
from flexolmo_jax.inference.sampling import sample
from flexolmo_jax.modeling.decode_state import DecodeState, EvidenceState, KVCache
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone, Output, forward_step, output_logits
from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import BATCH, specs_of

BUCKET = 64  # prompt and output lengths are rounded up to a multiple, so that few shapes compile


class Generation(NamedTuple):
    """The carry of the decoding loop. Donated to every call of it."""

    step: Int[Array, ""]  # tokens generated so far
    logits: Float[Array, "B V"]  # float32, of the next token
    done: Bool[Array, " B"]
    cache: KVCache
    router_state: Float[Array, "L E B"] | None  # float32, with config.memory
    evidence: EvidenceState | None  # with config.evidence
    generated: Int[Array, "B capacity"]


def _specs(config: ModelConfig) -> Any:
    """How a `Generation` is sharded."""
    evidence = EvidenceState(P(None, *BATCH), BATCH) if config.evidence else None  # type: ignore[arg-type]
    cache, router_state = P(None, *BATCH), P(None, None, *BATCH)
    return Generation(P(), BATCH, BATCH, cache, router_state, evidence, BATCH)  # type: ignore[arg-type]


def _padded_on_the_left(prompts: Sequence[Sequence[int]], batch: int):
    """The tokens [batch, T], and how many of each row are padding [batch]."""
    length = _round_up(max(len(prompt) for prompt in prompts))
    tokens = np.zeros((batch, length), np.int32)
    padding = np.full((batch,), length - 1, np.int32)  # rows without a prompt hold one token
    for row, prompt in enumerate(prompts):
        padding[row] = length - len(prompt)
        tokens[row, padding[row] :] = prompt
    return tokens, padding


def generate(
    backbone: Backbone,
    experts: Experts,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    allowed: np.ndarray,
    options: Options,
    mesh: Mesh | None = None,
) -> Iterator[Continuations]:
    """Continues prompts.

    Args:
      backbone, experts, config: the model.
      prompts: ids, at least one each; of any lengths.
      allowed: bool [B, E].
      options: when to end, how to choose, and how often to yield.
      mesh: the devices of the weights, if there are several; they share the prompts.

    Yields:
      the continuations so far.
    """
    max_new_tokens, stop, sampling, seed, interval = options
    batch = 1 << (len(prompts) - 1).bit_length()
    batch = batch if mesh is None else -(-batch // mesh.size) * mesh.size
    tokens, padding = _padded_on_the_left(prompts, batch)
    mask = np.concatenate([allowed, np.ones((batch - len(prompts), allowed.shape[1]), bool)])
    done = np.arange(batch) >= len(prompts)
    weights = (backbone, experts)
    capacity = _round_up(max_new_tokens)
    rows = placement.put_batch((tokens, padding, mask, done), mesh)
    with placement.use_mesh(mesh):
        state = _prefill(weights, *rows, config=config, capacity=capacity, mesh=mesh)
    _, padding, mask, _ = rows
    stop_ids = np.asarray(stop or [-1], np.int32)
    limit = 0
    while limit < max_new_tokens:
        limit = min(limit + (interval or max_new_tokens), max_new_tokens)
        key = jax.random.key(seed)
        with placement.use_mesh(mesh):
            state = decode(
                weights, state, padding, mask, key, stop_ids, limit,
                config=config, sampling=sampling, mesh=mesh,
            )  # fmt: skip
        rows = placement.to_host(state.generated)[: len(prompts), : int(state.step)].tolist()
        done = placement.to_host(state.done)
        yield Continuations(
            [list(itertools.takewhile(lambda token: token not in stop, ids)) for ids in rows],
            (done[: len(prompts)] | (limit == max_new_tokens)).tolist(),
        )
        if done.all():
            return


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _is_text(padding: jax.Array, slots: int) -> jax.Array:
    """bool [B, slots]: the slots of the cache that hold text, or will; the others hold padding."""
    return jnp.arange(slots) >= padding[:, None]


def _next_logits(weights, out: Output, config: ModelConfig) -> jax.Array:
    """The logits after the last token, float32 [B, V]."""
    backbone, experts = weights
    return output_logits(backbone, (experts,), out.hidden[:, -1], out.weights[:, :, -1], config)


@functools.partial(jax.jit, static_argnames=("config", "capacity", "mesh"))
def _prefill(weights, tokens, padding, allowed, done, *, config, capacity, mesh) -> Generation:
    """Reads left-padded prompts, int32 [B, P], into a cache with `capacity` slots more than P."""
    local = functools.partial(_prefill_local, config=config, capacity=capacity)
    specs = (specs_of(weights, mesh), BATCH, BATCH, BATCH, BATCH)
    return placement.shard_map(local, mesh, specs, _specs(config))(
        weights, tokens, padding, allowed, done
    )


def _prefill_local(weights, tokens, padding, allowed, done, *, config, capacity) -> Generation:
    backbone, experts = weights
    batch, length = tokens.shape
    cache = KVCache.empty(config, batch, length + capacity, jnp.dtype(config.dtype))
    segments = _is_text(padding, length).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(length) - padding[:, None], 0)
    out, state = forward_step(
        backbone, (experts,), tokens,
        DecodeState(cache, 0, positions), config, segments=segments, allowed=allowed,
    )  # fmt: skip
    generated = jnp.zeros((batch, capacity), jnp.int32)
    logits = _next_logits(weights, out, config)
    return Generation(
        jnp.int32(0), logits, done, state.cache, state.router_state, state.evidence, generated
    )


@functools.partial(jax.jit, static_argnames=("config", "sampling", "mesh"), donate_argnames="state")
def decode(weights, state, padding, allowed, key, stop, limit, *, config, sampling, mesh):
    """Generates until there are `limit` tokens or all sequences have ended.

    Args:
      weights: backbone and experts.
      state: a `Generation`.
      padding: int32 [B], the padding before each prompt.
      allowed: bool [B, E].
      key: of the random choices.
      stop: int32 [ids], each of which ends a sequence.
      limit: int.
    """
    local = functools.partial(_decode_local, config=config, sampling=sampling)
    of_state = _specs(config)
    specs = (specs_of(weights, mesh), of_state, BATCH, BATCH, P(), P(), P())
    return placement.shard_map(local, mesh, specs, of_state)(
        weights, state, padding, allowed, key, stop, limit
    )


def _decode_local(
    weights, state, padding, allowed, key, stop, limit, *, config, sampling
) -> Generation:
    backbone, experts = weights
    slots = state.cache.keys.shape[-2]
    length = slots - state.generated.shape[1]  # of the prompts
    rows = collectives.first_sequence(len(padding)) + jnp.arange(len(padding))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    is_text = _is_text(padding, slots)

    def is_unfinished(state):
        return (state.step < limit) & (collectives.psum_batch(jnp.sum(~state.done)) > 0)

    def generate_token(state):
        step, logits, done, cache, router_state, evidence, generated = state
        token = sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), sampling)
        token = jnp.where(done, stop[0], token)
        generated = jax.lax.dynamic_update_slice_in_dim(generated, token[:, None], step, axis=1)
        new_tokens = jnp.maximum(token, 0)[:, None]  # a stop id of -1 means that there is none
        offset = length + step
        positions = (offset - padding)[:, None]
        visible = is_text & (jnp.arange(slots) <= offset)
        out, decoded = forward_step(
            backbone, (experts,), new_tokens,
            DecodeState(cache, offset, positions, visible, router_state, evidence), config,
            allowed=allowed,
        )  # fmt: skip
        return Generation(
            step + 1, _next_logits(weights, out, config), done | jnp.isin(token, stop),
            decoded.cache, decoded.router_state, decoded.evidence, generated,
        )  # fmt: skip

    return jax.lax.while_loop(is_unfinished, generate_token, state)
