"""What a trace says: spans of a text that stand verbatim in owners' documents, and where."""

from typing import Any, NamedTuple


class Passage(NamedTuple):
    """A place in a document where a span stands, as much of it as its owner shows.

    Attributes:
      owner: whose document it is.
      document: its id, as its owner names it.
      source, licence, group: as they were indexed; empty where the document has none.
      before, match, after: the text around the match, and the match; empty where the owner shows
        no text.
      score: of BM25, against the text asked about; the higher, the more they share.
    """

    owner: str
    document: str
    source: str = ""
    licence: str = ""
    group: str = ""
    before: str = ""
    match: str = ""
    after: str = ""
    score: float = 0.0


class Span(NamedTuple):
    """A part of a text that occurs verbatim in documents.

    Attributes:
      start, stop: characters [start, stop) of the text.
      tokens: how many tokens long it is.
      log_probability: sum of its tokens' log unigram probabilities (nats): the lower, the rarer.
      counts: how often it occurs, by owner; only owners where it does.
      passages: some of the places, best first.
    """

    start: int
    stop: int
    tokens: int
    log_probability: float
    counts: dict[str, int]
    passages: tuple[Passage, ...] = ()


class Trace(NamedTuple):
    """Where the words of a text stand in owners' documents. It says nothing about causes.

    Attributes:
      text: what was asked about.
      spans: in the order of the text.
      similar: passages that are alike in meaning, not verbatim, best first.
      asked: the owners that were asked.
      missing: the owners that did not answer, and why.
      receipts: of owners that keep a log, the digest of the line that says what was revealed.
    """

    text: str
    spans: tuple[Span, ...]
    similar: tuple[Passage, ...] = ()
    asked: tuple[str, ...] = ()
    missing: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default; nothing changes it)
    receipts: dict[str, str] = {}  # noqa: RUF012

    def to_json(self) -> dict[str, Any]:
        """As JSON values, field by field."""
        spans = [
            {**span._asdict(), "passages": [p._asdict() for p in span.passages]}
            for span in self.spans
        ]
        similar = [passage._asdict() for passage in self.similar]
        return {**self._asdict(), "spans": spans, "similar": similar, "asked": list(self.asked)}
