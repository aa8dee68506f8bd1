"""Generation: one prefill, then one compiled loop over new tokens with a KV cache."""

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.inference.cpu_weights import Unstacked
from flexolmo_jax.inference.sampling import Sampling, sample
from flexolmo_jax.modeling.decode_state import DecodeState, EvidenceState, KVCache
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.kernels.quantized import dot
from flexolmo_jax.modeling.transformer import Backbone, Output, add_heads, forward_step
from flexolmo_jax.parallel import collectives, placement
from flexolmo_jax.parallel.mesh import BATCH, specs_of

BUCKET = 64  # prompt and output lengths are rounded up to a multiple, so that few shapes compile


class Generation(NamedTuple):
    """The carry of the decoding loop. Donated to every call of it."""

    step: Int[Array, ""]  # tokens generated so far
    logits: Float[Array, "B V"]  # float32, of the next token
    done: Bool[Array, " B"]
    cache: KVCache | tuple[KVCache, ...]
    router_state: Float[Array, "L E B"] | None  # float32, with config.memory
    evidence: EvidenceState | None  # with config.evidence
    generated: Int[Array, "B capacity"]


def _specs(config: ModelConfig) -> Any:
    """How a `Generation` is sharded."""
    evidence = EvidenceState(P(None, *BATCH), BATCH) if config.evidence else None  # type: ignore[arg-type]
    cache, router_state = P(None, *BATCH), P(None, None, *BATCH)
    return Generation(P(), BATCH, BATCH, cache, router_state, evidence, BATCH)  # type: ignore[arg-type]


def check_memory(config: ModelConfig, batch: int, length: int, max_new_tokens: int) -> None:
    """Raises ValueError if the keys and values of all tokens take more than half of the memory."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:  # a CPU
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    numbers = 2 * config.num_layers * config.kv_heads * config.head_size  # per token
    needed = batch * length * numbers * jnp.dtype(config.dtype).itemsize
    if needed > memory / 2:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} needs {needed / 1e9:,.0f} GB for keys and values, "
            f"more than half of the {memory / 1e9:,.0f} GB of memory; ask for fewer tokens (the "
            f"model was made for {config.max_length}), or for fewer prompts at a time"
        )


def checked_ends(until: Sequence[str]) -> list[str]:
    """The texts that end a continuation; a ValueError if one is empty."""
    ends = [until] if isinstance(until, str) else list(until)
    if not all(ends):
        raise ValueError("until must not contain an empty text, which would match everywhere")
    return ends


def all_ended(generated: list[list[int]], texts: list[str], ends: list[str]) -> bool:
    """Whether each continuation holds one of the ends or has reached a stop token."""
    longest = max(map(len, generated))  # a shorter one has reached a stop token
    return all(
        len(new) < longest or any(end in text for end in ends)
        for new, text in zip(generated, texts, strict=True)
    )


def before_first(text: str, ends: Sequence[str]) -> str:
    """The part of the text before the first of `ends`."""
    for end in ends:
        text = text.split(end)[0]
    return text


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
    unstacked: Unstacked | None,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    *,
    max_new_tokens: int,
    allowed: np.ndarray,
    stop: Sequence[int],
    sampling: Sampling,
    seed: int,
    interval: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[list[list[int]]]:
    """Continues prompts.

    Args:
      backbone, experts: the weights.
      unstacked: the same weights in the layout for CPUs; None decodes from the stacks.
      prompts: ids, at least one each; of any lengths.
      config: of the model.
      max_new_tokens: the maximum number of new tokens of each prompt.
      allowed: bool [B, E].
      stop: the ids that end a sequence; none of them is part of the result.
      sampling: how tokens are chosen.
      seed: of the random choices.
      interval: yield after this many new tokens; None: once, at the end.
      mesh: the devices of the weights, if there are several; they share the prompts.

    Yields:
      all new ids so far, of each prompt.
    """
    batch = 1 << (len(prompts) - 1).bit_length()
    batch = batch if mesh is None else -(-batch // mesh.size) * mesh.size
    tokens, padding = _padded_on_the_left(prompts, batch)
    mask = np.concatenate([allowed, np.ones((batch - len(prompts), allowed.shape[1]), bool)])
    done = np.arange(batch) >= len(prompts)
    weights = (backbone, experts, unstacked)
    if unstacked is not None:  # its layers are read expert by expert, so only used ones are read
        config = config.replace(expert_compute="dense")
    capacity = _round_up(max_new_tokens)
    rows = placement.put_batch((tokens, padding, mask, done), mesh)
    with placement.use_mesh(mesh):
        state = _prefill(weights, *rows, config=config, capacity=capacity, mesh=mesh)
    _, padding, mask, _ = rows
    stop_ids = np.asarray(stop or [-1], np.int32)
    limit, decode = 0, decode_on_cpu if jax.default_backend() == "cpu" else decode_on_accelerator
    while limit < max_new_tokens:
        limit = min(limit + (interval or max_new_tokens), max_new_tokens)
        key = jax.random.key(seed)
        with placement.use_mesh(mesh):
            state = decode(
                weights, state, padding, mask, key, stop_ids, limit,
                config=config, sampling=sampling, mesh=mesh,
            )  # fmt: skip
        rows = placement.to_host(state.generated)[: len(prompts), : int(state.step)].tolist()
        yield [list(itertools.takewhile(lambda token: token not in stop, ids)) for ids in rows]
        if placement.to_host(state.done).all():
            return


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _is_text(padding: jax.Array, slots: int) -> jax.Array:
    """bool [B, slots]: the slots of the cache that hold text, or will; the others hold padding."""
    return jnp.arange(slots) >= padding[:, None]


def _next_logits(weights, out: Output, config: ModelConfig) -> jax.Array:
    """The logits after the last token, float32 [B, V]."""
    backbone, experts, unstacked = weights
    head = unstacked.head if unstacked else backbone.head_matrix(config)
    hidden = out.hidden[:, -1]
    return add_heads(dot(hidden, head, jnp.float32), (experts,), hidden, out.weights[:, :, -1])


@functools.partial(jax.jit, static_argnames=("config", "capacity", "mesh"))
def _prefill(weights, tokens, padding, allowed, done, *, config, capacity, mesh) -> Generation:
    """Reads left-padded prompts, int32 [B, P], into a cache with `capacity` slots more than P."""
    local = functools.partial(_prefill_local, config=config, capacity=capacity)
    specs = (specs_of(weights, mesh), BATCH, BATCH, BATCH, BATCH)
    return placement.shard_map(local, mesh, specs, _specs(config))(
        weights, tokens, padding, allowed, done
    )


def _prefill_local(weights, tokens, padding, allowed, done, *, config, capacity) -> Generation:
    backbone, experts, unstacked = weights
    batch, length = tokens.shape
    cache = KVCache.empty(config, batch, length + capacity, jnp.dtype(config.dtype))
    segments = _is_text(padding, length).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(length) - padding[:, None], 0)
    out, state = forward_step(
        backbone, (experts,), tokens,
        DecodeState(cache if unstacked is None else cache.unstacked(), 0, positions), config,
        segments=segments, allowed=allowed,
        layers=unstacked and unstacked.layers, head=unstacked and unstacked.head,
    )  # fmt: skip
    generated = jnp.zeros((batch, capacity), jnp.int32)
    logits = _next_logits(weights, out, config)
    return Generation(
        jnp.int32(0), logits, done, state.cache, state.router_state, state.evidence, generated
    )


def _decode(weights, state, padding, allowed, key, stop, limit, *, config, sampling, mesh):
    """Generates until there are `limit` tokens or all sequences have ended.

    Args:
      weights: backbone, experts, and `Unstacked` or None.
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


_compiled = functools.partial(
    jax.jit, static_argnames=("config", "sampling", "mesh"), donate_argnames="state"
)
decode_on_accelerator = _compiled(_decode)
# XLA for CPU uses half of AVX-512's width by default, which converts 8-bit integers to floats more
# slowly than memory delivers them.
decode_on_cpu = _compiled(_decode, compiler_options={"xla_cpu_prefer_vector_width": 512})


def _decode_local(
    weights, state, padding, allowed, key, stop, limit, *, config, sampling
) -> Generation:
    backbone, experts, unstacked = weights
    layers = unstacked and unstacked.layers
    caches = state.cache if layers is not None else (state.cache,)
    slots = caches[0].keys.shape[-2]
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
            allowed=allowed, layers=layers, head=unstacked and unstacked.head,
        )  # fmt: skip
        return Generation(
            step + 1, _next_logits(weights, out, config), done | jnp.isin(token, stop),
            decoded.cache, decoded.router_state, decoded.evidence, generated,
        )  # fmt: skip

    return jax.lax.while_loop(is_unfinished, generate_token, state)
