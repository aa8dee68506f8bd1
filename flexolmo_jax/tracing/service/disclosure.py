"""What a policy lets an index say of a text.

An answer depends on nothing but what at least `minimum_documents` documents share. Leaving out the
spans that occur in fewer is not enough: a span that is common ends somewhere, and if it were left
out wherever a longer one, which only one document has, swallows it, its absence would tell of that
document. So each span is cut back to the longest part that enough documents hold, and the rule of
the maximal span applies to what is left. For the same reason no document is ranked by what else it
says: neither which places are shown nor their order depends on the text around them.
"""

import time
from typing import NamedTuple

import numpy as np

from flexolmo_jax.tracing.documents import read_passage
from flexolmo_jax.tracing.index import Index, Occurrence
from flexolmo_jax.tracing.results import Passage, Span
from flexolmo_jax.tracing.service.policy import Policy
from flexolmo_jax.tracing.spans import Asked, Match, as_asked, log_probability, matches, rarest

PASSAGES = 10  # of a span, at most
PLACES = 2000  # of a span, that are looked at to count its documents


class TooSlow(Exception):
    """A search took longer than the policy gives it."""


class Disclosed(NamedTuple):
    """What may be said of a text.

    Attributes:
      tokens: how many the text has.
      spans: in the order of the text; passages hold what the policy shows.
      characters: of documents, that are shown.
    """

    tokens: int
    spans: tuple[Span, ...]
    characters: int


def disclose(index: Index, text: str, policy: Policy, characters: int) -> Disclosed:
    """Traces a text as far as a policy lets it be said.

    Args:
      characters: of documents, that may still be shown; snippets beyond it are left out.

    Raises:
      TooSlow: after `policy.seconds`.
    """
    deadline = time.monotonic() + policy.seconds
    asked = as_asked(text, index.encode)
    least = policy.minimum_documents
    longest = [shared_lengths(index, form, least, deadline) for form in asked]
    found = matches(text, asked, longest)
    found = [match for match in found if _tokens(match) >= policy.minimum_tokens]
    count = len(asked[0].ids)
    spans, shown = [], 0
    known: dict[str, tuple[Passage, ...]] = {}
    for match in rarest(found, index.counts, count) if found else []:
        span = _span(index, match, policy)
        if policy.level in ("ids", "snippets"):
            words = text[match.start : match.stop]  # which the text may repeat
            if words not in known:
                known[words] = _passages(index, match, policy, characters - shown)
                shown += sum(len(p.before) + len(p.after) for p in known[words])
            span = span._replace(passages=known[words])
        spans.append(span)
    return Disclosed(count, tuple(spans), shown)


def shared_lengths(index: Index, asked: Asked, least: int, deadline: float) -> np.ndarray:
    """Of each token, how many from there on occur in at least `least` documents.

    Both ends of such a stretch only move forward: what is shared from one token on is shared from
    the next on, too. So it takes two searches for each token of the text.

    Returns:
      int32 [L].

    Raises:
      TooSlow: it is later than `deadline`, of `time.monotonic`.
    """
    longest = index.longest_matches(asked.ids)
    if least == 1:
        return longest
    groups: dict[int, object] = {}
    lengths, stop = np.zeros_like(longest), 0
    for start, length in enumerate(longest.tolist()):
        stop = max(stop, start)
        while stop < start + length:
            if time.monotonic() > deadline:
                raise TooSlow
            if not _has(index, asked.ids[start : stop + 1], least, groups):
                break
            stop += 1
        lengths[start] = stop - start
    return lengths


def _has(index: Index, ids: np.ndarray, least: int, groups: dict[int, object]) -> bool:
    """Whether at least `least` documents, of different groups, hold these tokens.

    Of a span that occurs more than `PLACES` times, as many places are looked at, spread over all of
    them; so a few documents that repeat it endlessly are not taken for many.

    Args:
      groups: of documents that were looked at before, by their numbers; it gains others.
    """
    for most in (2 * least, max(PLACES, 2 * least)):  # most spans need few places
        count, places = index.find(ids, most)
        if count < least:
            return False
        seen = set()
        for number in {place.document for place in places}:
            if number not in groups:
                groups[number] = index.document(number).group or number
            seen.add(groups[number])
            if len(seen) >= least:
                return True
        if count <= most:
            break
    return False


def _span(index: Index, match: Match, policy: Policy) -> Span:
    count = sum(index.find(ids, most=0)[0] for ids in match.forms)
    # Rounded: exact sums would tell how often single tokens occur.
    rarity = round(log_probability(match, index.counts), 1)
    return Span(match.start, match.stop, _tokens(match), rarity, {index.owner: count})


def _passages(index: Index, match: Match, policy: Policy, left: int) -> tuple[Passage, ...]:
    """Places of different documents, in the index's order; without text where none is `left`."""
    places: dict[int, tuple[Occurrence, int]] = {}
    for ids in match.forms:
        for place in index.find(ids, most=PASSAGES)[1]:
            places.setdefault(place.document, (place, len(ids)))
    passages = []
    for _, (place, length) in sorted(places.items())[:PASSAGES]:
        # A token is at least a character, so as many tokens are enough.
        passage = cut(read_passage(index, place, length, policy.context), policy.context)
        if len(passage.before) + len(passage.after) > left:
            passage = cut(passage, 0)
        left -= len(passage.before) + len(passage.after)
        passages.append(passage)
    return tuple(passages)


def cut(passage: Passage, characters: int) -> Passage:
    """With at most that many characters on each side of the match; without text if it is 0."""
    if not characters:
        return passage._replace(before="", match="", after="")
    return passage._replace(before=passage.before[-characters:], after=passage.after[:characters])


def _tokens(match: Match) -> int:
    return len(match.forms[0])
