"""Generation: one prefill, then one compiled loop over new tokens with a KV cache."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.inference.cpu_weights import Unstacked
from flexolmo_jax.inference.sampling import Sampling, sample
from flexolmo_jax.modeling.attention import KVCache
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.layers import dot
from flexolmo_jax.modeling.transformer import Backbone, forward
from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import BATCH, specs_of

BUCKET = 64  # prompt and output lengths are rounded up to it, so that few shapes are compiled


class State(NamedTuple):
    """Where a generation stands; given up to each call that goes on with it."""

    step: jax.Array  # int32: tokens made so far
    logits: jax.Array  # float32 [B, V], of the next token
    done: jax.Array  # bool [B]
    cache: KVCache | tuple[KVCache, ...]
    past: jax.Array | None  # float32 [L, E, B]: what the router remembers, if it does
    made: jax.Array  # int32 [B, room]


ROWS = BATCH
STATE = State(P(), ROWS, ROWS, P(None, *ROWS), P(None, None, *ROWS), ROWS)  # type: ignore[arg-type]


def generate(
    backbone: Backbone,
    experts: Experts,
    unstacked: Unstacked | None,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    *,
    max_new_tokens: int,
    allowed: np.ndarray,
    stop: Sequence[int],
    sampling: Sampling,
    seed: int,
    every: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[list[list[int]]]:
    """Continues prompts.

    Args:
      backbone, experts: the weights.
      unstacked: the same one by one; None runs over the stacks.
      prompts: ids, at least one each; of any lengths.
      config: of the model.
      max_new_tokens: at most so many are made for each.
      allowed: bool [B, E].
      stop: the ids that end a sequence; none of them is part of the result.
      sampling: how tokens are chosen.
      seed: of the random choices.
      every: hand over what there is after every so many tokens; None: once, at the end.
      mesh: where the weights are, if on several devices; the prompts are divided among them.

    Yields:
      the new ids of each prompt, all since the beginning.
    """
    batch = 1 << (len(prompts) - 1).bit_length()
    batch = batch if mesh is None else -(-batch // mesh.size) * mesh.size
    length = _round_up(max(len(prompt) for prompt in prompts))
    tokens = np.zeros((batch, length), np.int32)
    padding = np.full((batch,), length - 1, np.int32)  # rows that only fill the batch: one token
    for row, prompt in enumerate(prompts):
        padding[row] = length - len(prompt)
        tokens[row, padding[row] :] = prompt
    mask = np.concatenate([allowed, np.ones((batch - len(prompts), allowed.shape[1]), bool)])
    done = np.arange(batch) >= len(prompts)
    weights = (backbone, experts, unstacked)
    room = _round_up(max_new_tokens)
    rows = placement.put_batch((tokens, padding, mask, done), mesh)
    with placement.use_mesh(mesh):
        state = _prefill(weights, *rows, config=config, room=room, mesh=mesh)
    _, padding, mask, _ = rows
    ends = np.asarray(stop or [-1], np.int32)
    limit, go_on = 0, _go_on_cpu if jax.default_backend() == "cpu" else decode_tokens
    while limit < max_new_tokens:
        limit = min(limit + (every or max_new_tokens), max_new_tokens)
        key = jax.random.key(seed)
        with placement.use_mesh(mesh):
            state = go_on(
                weights, state, padding, mask, key, ends, limit,
                config=config, sampling=sampling, mesh=mesh,
            )  # fmt: skip
        made = placement.to_host(state.made)[: len(prompts), : int(state.step)].tolist()
        yield [list(itertools.takewhile(lambda token: token not in stop, ids)) for ids in made]
        if placement.to_host(state.done).all():
            return


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _visible(padding: jax.Array, slots: int) -> jax.Array:
    """bool [B, slots]: which slots of the cache hold, or will hold, text."""
    return jnp.arange(slots) >= padding[:, None]


def _next_logits(weights, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """[B, D] -> float32 [B, V]."""
    backbone, _, unstacked = weights
    head = unstacked.head if unstacked else backbone.head_matrix(config)
    return dot(hidden, head, jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "room", "mesh"))
def _prefill(weights, tokens, padding, allowed, done, *, config, room, mesh) -> State:
    """Reads the prompts, tokens int32 [B, P], left-padded; has room for `room` new tokens."""
    read = functools.partial(_read, config=config, room=room)
    where = (specs_of(weights, mesh), ROWS, ROWS, ROWS, ROWS)
    return placement.shard_map(read, mesh, where, STATE)(weights, tokens, padding, allowed, done)


def _read(weights, tokens, padding, allowed, done, *, config, room) -> State:
    backbone, experts, unstacked = weights
    batch, length = tokens.shape
    empty = KVCache.empty(config, batch, length + room, jnp.dtype(config.dtype))
    cache: KVCache | tuple[KVCache, ...] = empty
    if unstacked is not None:
        cache = tuple(KVCache(k, v) for k, v in zip(*empty, strict=True))
    out = forward(
        backbone, (experts,), tokens, config,
        segments=_visible(padding, length).astype(jnp.int32),
        positions=jnp.maximum(jnp.arange(length) - padding[:, None], 0),
        allowed=allowed, cache=cache, layers=unstacked and unstacked.layers,
    )  # fmt: skip
    made = jnp.zeros((batch, room), jnp.int32)
    logits = _next_logits(weights, out.hidden[:, -1], config)
    assert out.cache is not None
    return State(jnp.int32(0), logits, done, out.cache, out.past, made)


def _loop(weights, state, padding, allowed, key, stop, limit, *, config, sampling, mesh) -> State:
    """Makes tokens until there are `limit` or all sequences have ended; stop: int32 [K]."""
    make = functools.partial(_make, config=config, sampling=sampling)
    where = (specs_of(weights, mesh), STATE, ROWS, ROWS, P(), P(), P())
    return placement.shard_map(make, mesh, where, STATE)(
        weights, state, padding, allowed, key, stop, limit
    )


_compiled = functools.partial(
    jax.jit, static_argnames=("config", "sampling", "mesh"), donate_argnames="state"
)
decode_tokens = _compiled(_loop)
# XLA for CPU takes half of AVX-512's width by default: too slow to turn 8-bit integers into floats
# as fast as memory brings them.
_go_on_cpu = _compiled(_loop, compiler_options={"xla_cpu_prefer_vector_width": 512})


def _make(weights, state, padding, allowed, key, stop, limit, *, config, sampling) -> State:
    backbone, experts, unstacked = weights
    layers = unstacked and unstacked.layers
    caches = state.cache if layers is not None else (state.cache,)
    slots = caches[0].keys.shape[-2]
    length = slots - state.made.shape[1]  # of the prompts
    rows = collectives.first_sequence(len(padding)) + jnp.arange(len(padding))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    is_text = _visible(padding, slots)

    def more(state):
        return (state.step < limit) & (collectives.psum_batch(jnp.sum(~state.done)) > 0)

    def one(state):
        step, logits, done, cache, past, made = state
        token = sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), sampling)
        token = jnp.where(done, stop[0], token)
        made = jax.lax.dynamic_update_slice_in_dim(made, token[:, None], step, axis=1)
        at = length + step
        out = forward(
            backbone, (experts,), jnp.maximum(token, 0)[:, None], config,
            positions=(at - padding)[:, None], allowed=allowed, cache=cache, at=at,
            visible=is_text & (jnp.arange(slots) <= at), past=past, layers=layers,
        )  # fmt: skip
        logits = _next_logits(weights, out.hidden[:, 0], config)
        return State(step + 1, logits, done | jnp.isin(token, stop), out.cache, out.past, made)

    return jax.lax.while_loop(more, one, state)
