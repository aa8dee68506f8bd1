"""Answers of owners: parsed strictly, since each comes from a stranger, and put together."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexolmo_jax.tracing.documents import ranked
from flexolmo_jax.tracing.results import Passage, Span, Trace
from flexolmo_jax.tracing.spans import DENSITY

MAX_BYTES = 1 << 22  # of an answer
_Count = Annotated[int, Field(ge=1, lt=1 << 53)]
_Word = Annotated[str, Field(max_length=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class SaidPassage(_Strict):
    """A place, as an owner says it."""

    document: Annotated[str, Field(min_length=1, max_length=1000)]
    source: _Word
    licence: _Word
    group: _Word
    before: _Word
    after: _Word


class SaidSpan(_Strict):
    """A span, as an owner says it."""

    start: Annotated[int, Field(ge=0)]
    stop: int
    tokens: _Count
    log_probability: Annotated[float, Field(le=0, ge=-1e9)]
    count: _Count
    passages: Annotated[list[SaidPassage], Field(max_length=10)]


class Said(_Strict):
    """What an owner says of a text."""

    owner: _Word
    level: Literal["counts", "ids", "snippets"]
    tokens: Annotated[int, Field(ge=0)]
    spans: list[SaidSpan]
    receipt: Annotated[str, Field(max_length=64)] | None


def parse_answer(body: bytes, text: str) -> Said:
    """An owner's answer to a text.

    Raises:
      ValueError: it is none, or says what cannot be of this text.
    """
    try:
        said = Said.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise ValueError(f"{where}: {first['msg']}") from None
    most = math.ceil(DENSITY * len(text.encode()))  # a token has a byte at least
    count = len({text[span.start : span.stop] for span in said.spans})  # each may be repeated
    if count > most:
        raise ValueError(f"spans: expected at most {most} in such a text, found {count}")
    start, stop = -1, 0
    for span in said.spans:  # in order, and none inside another
        if not start < span.start < span.stop <= len(text) or span.stop <= stop:
            raise ValueError(f"spans: not maximal spans of the text: {span.start} to {span.stop}")
        start, stop = span.start, span.stop
    return said


def together(
    text: str, said: Mapping[str, Said], query: str, asked: Sequence[str], missing: dict[str, str]
) -> Trace:
    """What owners say of one text, as one trace.

    Each owner's spans are maximal among its own, and the rarest of them. No owner can hide what
    another says: a span stays although somebody else claims to have a longer one around it.

    Args:
      text: that they were asked about.
      said: by the owners' names, as the coordinator knows them.
      query: passages are ranked against it (BM25), by the text that was shown of them.
      asked, missing: as in `Trace`.
    """
    found: dict[tuple[int, int], Span] = {}
    for owner, answer in said.items():
        for span in answer.spans:
            place = span.start, span.stop
            own = _as_span(owner, span, text, answer.level)
            known = found.get(place)
            if known is not None:
                own = own._replace(
                    log_probability=max(known.log_probability, own.log_probability),
                    counts=known.counts | own.counts,
                    passages=known.passages + own.passages,
                )
            found[place] = own
    spans = [found[place] for place in sorted(found)]
    receipts = {owner: answer.receipt for owner, answer in said.items() if answer.receipt}
    return Trace(text, tuple(ranked(spans, query)), (), tuple(asked), missing, receipts)


def _as_span(owner: str, said: SaidSpan, text: str, level: str) -> Span:
    match = text[said.start : said.stop]
    passages = tuple(
        Passage(
            owner,
            place.document,
            place.source,
            place.licence,
            place.group,
            place.before,
            match if level == "snippets" and (place.before or place.after) else "",
            place.after,
        )
        for place in said.passages
    )
    counts = {owner: said.count}
    return Span(said.start, said.stop, said.tokens, said.log_probability, counts, passages)
