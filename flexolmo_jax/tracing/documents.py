"""The places where spans stand: read from the indexes, spread over owners, best first."""

from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers

from flexolmo_jax.tracing.bm25 import bm25
from flexolmo_jax.tracing.index import Index, Occurrence
from flexolmo_jax.tracing.results import Passage, Span
from flexolmo_jax.tracing.spans import Match

DOCUMENTS = 10  # shown of a span, at most
CONTEXT = 100  # tokens on each side of a span


def find_passages(match: Match, indexes: Sequence[Index]) -> tuple[dict[str, int], list[Passage]]:
    """How often a span occurs with each owner, and some of the places, one of a document.

    Every owner that has the span gets an equal share of the `DOCUMENTS`, spread evenly over the
    places where it has it.

    Returns:
      occurrences by owner, and passages without scores.
    """
    counts: dict[str, int] = {}
    having = []
    for index in indexes:
        for ids in match.forms:
            count, _ = index.find(ids, most=0)
            if count:
                counts[index.owner] = counts.get(index.owner, 0) + count
                having.append((index, ids))
    share = -(-DOCUMENTS // max(1, len(having)))
    found: dict[tuple[str, int], Passage] = {}
    for index, ids in having:
        for place in index.find(ids, most=share)[1]:
            key = (str(index.folder), place.document)
            if key not in found:
                found[key] = read_passage(index, place, len(ids))
    return counts, list(found.values())[:DOCUMENTS]


def read_passage(index: Index, place: Occurrence, length: int, context: int = CONTEXT) -> Passage:
    """The text around a match of `length` tokens, with what the index holds of its document."""
    record = index.document(place.document)
    start = max(0, place.start - context)
    stop = min(record.tokens, place.start + length + context)
    ids = index.read(place.document, start, stop)
    before, match, after = _texts(index.tokenizer, ids, place.start - start, length)
    return Passage(
        owner=index.owner,
        document=record.id,
        source=record.source,
        licence=record.licence,
        group=record.group,
        before=before,
        match=match,
        after=after,
    )


def _texts(
    tokenizer: tokenizers.Tokenizer, ids: np.ndarray, first: int, length: int
) -> tuple[str, str, str]:
    """The text before a match, of the match without the space before it, and behind it."""
    numbers = [int(number) for number in ids]
    # Whole beginnings are decoded: some tokenizers leave out the first space of what they decode.
    ends = (first, first + length, len(numbers))
    one, two, all_text = (tokenizer.decode(numbers[:end]) for end in ends)
    before, match, after = all_text[: len(one)], all_text[len(one) : len(two)], all_text[len(two) :]
    stripped = match.lstrip()
    before += match[: len(match) - len(stripped)]
    # Where the context begins or ends in the middle of a character.
    return before.lstrip("\ufffd"), stripped, after.rstrip("\ufffd")


def ranked(spans: Sequence[Span], query: str) -> list[Span]:
    """The spans with their passages' scores, best first: BM25 of all passages against a query.

    Args:
      query: the prompt and the text that was asked about.
    """
    texts = {_key(p): p.before + p.match + p.after for span in spans for p in span.passages}
    scores: Mapping = dict(zip(texts, bm25(query, list(texts.values())).tolist(), strict=True))
    return [
        span._replace(
            passages=tuple(
                sorted(
                    (p._replace(score=round(scores[_key(p)], 4)) for p in span.passages),
                    key=lambda p: (-p.score, p.owner, p.document),
                )
            )
        )
        for span in spans
    ]


def _key(passage: Passage) -> tuple[str, str, str, str]:
    return passage.owner, passage.document, passage.before, passage.match
