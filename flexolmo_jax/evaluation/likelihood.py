"""Log-likelihoods of many continuations, in batches of few shapes, reading each text once."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.model import FlexOlmo

BATCH_TOKENS = 8192  # approximate size of a batch, whatever the length of its rows


class Query(NamedTuple):
    """Token ids: how likely is `continuation` after `context`? Each has at least one.

    `allowed` is of the experts that this query may use, in the order of the stack; None: all.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    allowed: tuple[bool, ...] | None = None


class Answer(NamedTuple):
    nats: float  # log-likelihood of the continuation
    greedy: bool  # each of its tokens is the likeliest one


_Shape = tuple[int, int, int]  # tokens, tokens of the longest continuation, queries per row


class _Row(NamedTuple):
    """The tokens that the network reads, and the indices of the queries that they answer."""

    tokens: tuple[int, ...]
    queries: list[int]
    allowed: tuple[bool, ...] | None


def likelihoods(
    model: FlexOlmo,
    queries: Sequence[Query],
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answers queries, in their order.

    Texts longer than the model's maximum length are truncated on the left. Queries that differ in
    their last token only, such as the letters of a multiple choice, are read once, if they may
    use the same experts.

    Args:
      model: the model to ask.
      queries: token ids.
      without, only: experts to switch off, or the only ones to use.
      advance: called with the number of queries that each batch has answered.

    Raises:
      ValueError: an empty context or continuation, a continuation longer than the model's maximum
        length, or as `FlexOlmo.allowed`.
    """
    answers: list[Answer | None] = [None] * len(queries)
    for shape, rows in _by_shape(queries, model.config.max_length):
        length, longest, max_queries = shape
        size = at_least(min(len(rows), max(1, BATCH_TOKENS // length)), 2)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            tokens = np.zeros((size, length), np.int32)
            lengths = np.ones(size, np.int32)
            targets = np.full((size, longest, max_queries), -1, np.int32)
            allowed = np.ones((size, len(model.expert_names)), bool)
            for i, row in enumerate(batch):
                lengths[i] = len(row.tokens)
                tokens[i, : lengths[i]] = row.tokens
                allowed[i] = True if row.allowed is None else row.allowed
                for k, query in enumerate(row.queries):
                    continuation = queries[query].continuation
                    targets[i, longest - len(continuation) :, k] = continuation
            scores = model.log_likelihoods(
                tokens, targets, lengths, without=without, only=only, allowed=allowed
            )
            nats, greedy = scores.log_probabilities.sum(axis=1), scores.is_greedy.all(axis=1)
            for i, row in enumerate(batch):
                for k, query in enumerate(row.queries):
                    answers[query] = Answer(float(nats[i, k]), bool(greedy[i, k]))
            advance(sum(len(row.queries) for row in batch))
    return answers  # type: ignore[return-value]


def _by_shape(queries: Sequence[Query], limit: int) -> list[tuple[_Shape, list[_Row]]]:
    """Rows by the shape to which they are padded, the longest first."""
    rows: dict[tuple[tuple[int, ...], tuple[bool, ...] | None], list[int]] = {}
    for index, (context, continuation, allowed) in enumerate(queries):
        if not context or not continuation or len(continuation) > limit:
            raise ValueError(
                f"query {index}: expected a context, and a continuation of 1 to {limit} tokens "
                f"(what the model was made for), found {len(context)} and {len(continuation)}"
            )
        tokens = (*context[-limit:], *continuation)[-(limit + 1) : -1]
        rows.setdefault((tokens, allowed), []).append(index)
    groups: dict[_Shape, list[_Row]] = {}
    for (tokens, allowed), indices in rows.items():
        longest = max(len(queries[index].continuation) for index in indices)
        length = min(at_least(len(tokens), 2, 32), limit)
        shape = (length, min(at_least(longest, 8), length), at_least(len(indices), 4))
        groups.setdefault(shape, []).append(_Row(tokens, indices, allowed))
    return sorted(groups.items(), key=lambda group: group[0], reverse=True)


def at_least(count: int, factor: int, smallest: int = 1) -> int:
    """The smallest of smallest * factor^n that is at least `count`."""
    while smallest < count:
        smallest *= factor
    return smallest
