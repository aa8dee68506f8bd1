"""How likely continuations are, for many of them: batches of few shapes, nothing computed twice."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.modeling.transformer import forward
from flexolmo_jax.parallel import placement
from flexolmo_jax.parallel.mesh import BATCH, specs_of

TOKENS = 8192  # that a batch has, about, whatever the length of its rows
POSITIONS = 512  # of a batch whose logits are in memory at a time


class Query(NamedTuple):
    """Token ids: how likely is `continuation` after `context`? Each has at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Answer(NamedTuple):
    nats: float  # log-likelihood of the continuation
    greedy: bool  # each of its tokens is the likeliest


_Shape = tuple[int, int, int]  # of tokens; of the longest continuation; of queries of one row


class _Row(NamedTuple):
    """What the network reads, and the queries that it answers."""

    tokens: tuple[int, ...]
    queries: list[int]


def likelihoods(
    model: FlexOlmo,
    queries: Sequence[Query],
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answers queries, in their order.

    What is longer than the model was made for loses its beginning. Queries that differ in their
    last token only, such as the letters of a multiple choice, are read once.

    Args:
      model: any.
      queries: token ids.
      without, only: experts to switch off, or the only ones to use.
      advance: told how many queries each batch has answered.

    Raises:
      ValueError: an empty part, a continuation longer than the model was made for, or as
        `FlexOlmo.allowed`.
    """
    answers: list[Answer | None] = [None] * len(queries)
    for shape, rows in _by_shape(queries, model.config.max_length):
        length, longest, most = shape
        size = at_least(min(len(rows), max(1, TOKENS // length)), 2)
        mask = model.allowed(size, without, only)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            tokens = np.zeros((size, length), np.int32)
            lengths = np.ones(size, np.int32)
            targets = np.full((size, longest, most), -1, np.int32)
            for i, row in enumerate(batch):
                lengths[i] = len(row.tokens)
                tokens[i, : lengths[i]] = row.tokens
                for k, query in enumerate(row.queries):
                    continuation = queries[query].continuation
                    targets[i, longest - len(continuation) :, k] = continuation
            if max(tokens.max(), targets.max()) >= model.config.vocab_size:
                raise ValueError(
                    f"tokens must be below {model.config.vocab_size}, the vocabulary's size; found "
                    f"{max(tokens.max(), targets.max())}"
                )
            filled = model.pad_batch((tokens, lengths, targets, mask))
            given = placement.put_batch(filled, model.mesh)
            with placement.use_mesh(model.mesh):
                found = _answer(model.backbone, model.experts, *given, model.config, model.mesh)
            nats, greedy = (placement.to_host(x) for x in found)
            for i, row in enumerate(batch):
                for k, query in enumerate(row.queries):
                    answers[query] = Answer(float(nats[i, k]), bool(greedy[i, k]))
            advance(sum(len(row.queries) for row in batch))
    return answers  # type: ignore[return-value]


def _by_shape(
    queries: Sequence[Query], limit: int
) -> list[tuple[tuple[int, int, int], list[_Row]]]:
    """Rows by what they are filled up to, the longest first: (tokens, continuation, queries)."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(queries):
        if not context or not continuation or len(continuation) > limit:
            raise ValueError(
                f"query {number}: expected a context, and a continuation of 1 to {limit} tokens "
                f"(what the model was made for), found {len(context)} and {len(continuation)}"
            )
        tokens = (*context[-limit:], *continuation)[-(limit + 1) : -1]
        rows.setdefault(tokens, []).append(number)
    groups: dict[_Shape, list[_Row]] = {}
    for tokens, numbers in rows.items():
        longest = max(len(queries[number].continuation) for number in numbers)
        length = min(at_least(len(tokens), 2, 32), limit)
        shape = (length, min(at_least(longest, 8), length), at_least(len(numbers), 4))
        groups.setdefault(shape, []).append(_Row(tokens, numbers))
    return sorted(groups.items(), key=lambda group: group[0], reverse=True)


def at_least(count: int, factor: int, smallest: int = 1) -> int:
    """The first of smallest * factor^n that is not below `count`."""
    while smallest < count:
        smallest *= factor
    return smallest


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _answer(backbone, experts, tokens, lengths, targets, allowed, config: ModelConfig, mesh):
    """Log-likelihoods and whether they are greedy, [B, K].

    Args:
      tokens: int32 [B, S], filled up on the right, which nothing before can see.
      lengths: int32 [B], without what fills up.
      targets: int32 [B, C, K]: what the last C of them should predict; -1 is nothing.
      allowed: bool [B, E].
    """

    def local(backbone, experts, tokens, lengths, targets, allowed):
        out = forward(backbone, (experts,), tokens, config, allowed=allowed)
        count = targets.shape[1]
        at = lengths[:, None] + jnp.arange(-count, 0)
        hidden = jnp.take_along_axis(out.hidden, jnp.maximum(at, 0)[..., None], axis=1)  # [B, C, D]

        def part(given):
            hidden, targets = given
            logits = backbone.logits(hidden, config)
            chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0), axis=-1)
            nats = chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            greedy = jnp.argmax(logits, axis=-1, keepdims=True) == targets
            is_text = targets >= 0
            return jnp.sum(jnp.where(is_text, nats, 0.0), axis=1), (greedy | ~is_text).all(axis=1)

        size = math.gcd(count, at_least(max(1, POSITIONS // len(tokens)), 2))

        def split(x):  # [B, C, ...] -> [C / size, B, size, ...]
            return x.reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)

        nats, greedy = jax.lax.map(part, (split(hidden), split(targets)))
        return nats.sum(axis=0), greedy.all(axis=0)

    weights, rows = (backbone, experts), BATCH
    where = mesh and (*specs_of(weights, mesh), rows, rows, rows, rows)
    answer = placement.shard_map(local, mesh, where, (rows, rows))
    return answer(*weights, tokens, lengths, targets, allowed)
