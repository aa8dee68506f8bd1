"""Generation: one prefill, then one compiled loop over new tokens with a KV cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.inference.sampling import Sampling, sample
from flexolmo_jax.inference.unstacked import Unstacked, turn_back
from flexolmo_jax.modeling.attention import KVCache
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone, forward

BUCKET = 64  # prompt and output lengths are rounded up to it, so that few shapes are compiled


def generate(
    backbone: Backbone,
    experts: Experts,
    unstacked: Unstacked | None,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    *,
    max_new_tokens: int,
    allowed: np.ndarray,
    stop: int | None,
    sampling: Sampling,
    seed: int,
) -> list[list[int]]:
    """Continues prompts.

    Args:
      backbone, experts: the weights.
      unstacked: the same one by one, turned for a batch of one; None runs over the stacks.
      prompts: ids, at least one each; of any lengths.
      config: of the model.
      max_new_tokens: at most so many are made for each.
      allowed: bool [B, E].
      stop: the id that ends a sequence, if any; it is not part of the result.
      sampling: how tokens are chosen.
      seed: of the random choices.

    Returns:
      the new ids of each prompt.
    """
    batch = 1 << (len(prompts) - 1).bit_length()
    length = _round_up(max(len(prompt) for prompt in prompts))
    tokens = np.zeros((batch, length), np.int32)
    padding = np.full((batch,), length - 1, np.int32)  # rows that only fill the batch: one token
    for row, prompt in enumerate(prompts):
        padding[row] = length - len(prompt)
        tokens[row, padding[row] :] = prompt
    rows = np.concatenate([allowed, np.ones((batch - len(prompts), allowed.shape[1]), bool)])
    done = np.arange(batch) >= len(prompts)
    out, count = _generate(
        backbone, experts, unstacked, tokens, padding, rows, done, jax.random.key(seed),
        -1 if stop is None else stop, max_new_tokens,
        config=config, room=_round_up(max_new_tokens), sampling=sampling,
    )  # fmt: skip
    made = np.asarray(out)[: len(prompts), : int(count)].tolist()
    return [ids[: ids.index(stop)] if stop in ids else ids for ids in made]


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


@functools.partial(jax.jit, static_argnames=("config", "room", "sampling"))
def _generate(
    backbone, experts, unstacked, tokens, padding, allowed, done, key, stop, limit,
    *, config, room, sampling,
):  # fmt: skip
    """tokens int32 [B, P], left-padded -> (int32 [B, room], how many columns were filled)."""
    batch, length = tokens.shape
    if unstacked is None:
        layers, head = None, backbone.head_matrix()
    else:
        layers, head = turn_back(unstacked) if batch == 1 else unstacked
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    slots = jnp.arange(length + room)
    is_text = slots >= padding[:, None]  # [B, P + room]

    def next_logits(hidden):
        return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def prefill(cache):
        segments = is_text[:, :length].astype(jnp.int32)
        positions = jnp.maximum(slots[:length] - padding[:, None], 0)
        out = forward(
            backbone, (experts,), tokens, config,
            segments=segments, positions=positions, allowed=allowed, cache=cache, layers=layers,
        )  # fmt: skip
        return next_logits(out.hidden[:, -1]), out.cache

    def advance(token, cache, at):
        out = forward(
            backbone, (experts,), token[:, None], config,
            positions=(at - padding)[:, None], allowed=allowed, cache=cache, at=at,
            visible=is_text & (slots <= at), layers=layers,
        )  # fmt: skip
        return next_logits(out.hidden[:, 0]), out.cache

    def choose(logits, step, done):
        token = sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), sampling)
        return jnp.where(done, stop, token)

    def more(carry):
        step, _, done, _, _ = carry
        return (step < limit) & ~jnp.all(done)

    def one(carry):
        step, logits, done, cache, made = carry
        token = choose(logits, step, done)
        made = jax.lax.dynamic_update_slice_in_dim(made, token[:, None], step, axis=1)
        logits, cache = advance(jnp.maximum(token, 0), cache, length + step)
        return step + 1, logits, done | (token == stop), cache, made

    cache = KVCache.empty(config, batch, length + room, jnp.dtype(config.dtype))
    if layers is not None:
        cache = tuple(KVCache(k, v) for k, v in zip(*cache, strict=True))
    logits, cache = prefill(cache)
    made = jnp.zeros((batch, room), jnp.int32)
    count, _, _, _, made = jax.lax.while_loop(more, one, (0, logits, done, cache, made))
    return made, count
