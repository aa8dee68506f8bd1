"""Which spans of a text stand verbatim in indexed text: maximal, of whole words, in one sentence.

The method is OLMoTrace's (Liu et al. 2025, arXiv 2504.07096, section 3), with borders taken from
the characters of the text, where it looks at single tokens: a point ends a sentence only before
white space, so that `os.path` and `3.14` stay whole.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

DENSITY = 0.05  # spans that are kept for each token of the text

Encode = Callable[[str], tuple[np.ndarray, list[tuple[int, int]]]]

_END = re.compile(
    r"""[.!?…]+["'”’»)\]]*(?=\s|$)"""  # a sentence's, with what closes behind it
    r"|[。！？]+[」』”’]*"
    r"|[\n\r\v\f\x85\u2028\u2029]"  # a line's
)
_CLOSERS = frozenset(""",.;:!?…%)]}’”»、。，；：！？」』）""")  # no span begins with one
# Scripts that put no space between words: every character may begin or end a span.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


class Asked(NamedTuple):
    """A text in tokens, with where spans may begin and end. L tokens.

    Attributes:
      ids: uint32 [L].
      starts, stops: int64 [L], characters of the text: each token without white space around it.
      begins, ends: bool [L]: a word begins, or ends, with this token.
      cut: int64 [L]: the token behind the last that a span which begins here may hold.
    """

    ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    cut: np.ndarray


class Match(NamedTuple):
    """A span of a text, characters [start, stop), and its token ids, in every form that matched."""

    start: int
    stop: int
    forms: tuple[np.ndarray, ...]


def as_asked(text: str, encode: Encode) -> list[Asked]:
    """A text in the forms in which documents may hold it.

    Tokenizers join a space to the word behind it, so that the first word of a sentence is another
    token inside a paragraph than at the start of a line or of an answer. So the text is asked as it
    is, and again with each sentence alone: with a space before it where it had none, and without
    where it had one.
    """
    whole = _asked(text, encode)
    if not len(whole.ids):
        return [whole]
    pieces, tokens = [], 0
    for start, stop in _sentences(text):
        space = "" if text[start - 1 : start] == " " else " "
        piece = _asked(space + text[start:stop], encode)
        shift = start - len(space)
        pieces.append(
            piece._replace(
                starts=piece.starts + shift, stops=piece.stops + shift, cut=piece.cut + tokens
            )
        )
        tokens += len(piece.ids)
    return [whole, Asked(*map(np.concatenate, zip(*pieces, strict=True)))] if pieces else [whole]


def _sentences(text: str) -> list[tuple[int, int]]:
    """Where each sentence begins and ends, without white space before it."""
    found, start = [], 0
    for stop in [*(match.end() for match in _END.finditer(text)), len(text)]:
        sentence = text[start:stop]
        if sentence.strip():
            found.append((stop - len(sentence.lstrip()), stop))
        elif found:  # lines end behind it: some tokenizers join them to the point
            found[-1] = (found[-1][0], stop)
        start = stop
    return found


def _asked(text: str, encode: Encode) -> Asked:
    ids, offsets = encode(text)
    raw = np.array(offsets, np.int64).reshape(-1, 2)
    count = len(raw)
    shown = [text[a:b] for a, b in raw]
    is_shown = np.array([bool(piece.strip()) for piece in shown], bool)
    starts = raw[:, 0] + np.array([len(p) - len(p.lstrip()) for p in shown], np.int64)
    stops = raw[:, 1] - np.array([len(p) - len(p.rstrip()) for p in shown], np.int64)
    inside = _inside_words(text)
    closes = np.array([piece.strip()[:1] in _CLOSERS for piece in shown], bool)
    # Tokens that share a character, of which each is some bytes, stay together.
    is_joined = raw[1:, 0] < raw[:-1, 1]
    alone = np.zeros(min(count, 1), bool)
    begins = is_shown & ~closes & ~inside[starts] & ~np.concatenate([alone, is_joined])
    ends = is_shown & ~inside[stops] & ~np.concatenate([is_joined, alone])
    return Asked(np.asarray(ids, np.uint32), starts, stops, begins, ends, _cuts(text, raw, stops))


def _inside_words(text: str) -> np.ndarray:
    """bool [len(text) + 1]: this place, before a character, is in the middle of a word."""
    kinds = [unicodedata.category(c)[0] for c in text]
    joins = np.zeros(len(text), bool)
    for place, (kind, character) in enumerate(zip(kinds, text, strict=True)):
        joins[place] = character == "_" or (kind in "LNM" and not _UNSPACED.match(character))
    for match in re.finditer(r"(?<=\w)['’](?=\w)", text):  # don't
        joins[match.start()] = True
    inside = np.zeros(len(text) + 1, bool)
    if len(text) > 1:
        is_mark = np.array([k == "M" for k in kinds], bool)
        inside[1:-1] = (joins[:-1] & joins[1:]) | is_mark[1:]
    return inside


def _cuts(text: str, raw: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """int64 [L]: the token behind the one that reaches the next end of a sentence or a line."""
    borders = np.array([*(match.end() for match in _END.finditer(text)), len(text)], np.int64)
    border = borders[np.searchsorted(borders[:-1], raw[:, 0], side="right")]
    return np.searchsorted(stops, border, side="right")


def maximal_spans(asked: Asked, longest: np.ndarray) -> list[tuple[int, int]]:
    """The maximal spans, as ranges of tokens [start, stop), in order.

    Args:
      asked: the text.
      longest: int [L]: how many tokens from each one on occur, in the index where most do.

    Returns:
      those that begin and end with words, hold a letter or a digit, cross no end of a sentence or a
      line, and lie in no other one.
    """
    count = len(asked.ids)
    here = np.arange(count)
    reach = np.minimum(here + longest, asked.cut)
    # The last end of a word at or before each token; 0 where there is none.
    word_end = np.maximum.accumulate(np.concatenate([[0], np.where(asked.ends, here + 1, 0)]))
    stop = np.where(asked.begins, word_end[reach], 0)
    stop[stop <= here] = 0
    before = np.concatenate([[0], np.maximum.accumulate(stop)[:-1]]) if count else stop
    return [(int(i), int(stop[i])) for i in np.flatnonzero(stop > before)]


def matches(text: str, asked: Sequence[Asked], longest: Sequence[np.ndarray]) -> list[Match]:
    """The maximal spans of all forms of a text together, in the order of the text.

    Args:
      text: what was asked.
      asked: its forms (`as_asked`).
      longest: int [L] for each form, as `maximal_spans` takes it.
    """
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    for form, lengths in zip(asked, longest, strict=True):
        for first, last in maximal_spans(form, lengths):
            place = (int(form.starts[first]), int(form.stops[last - 1]))
            ids, known = form.ids[first:last], found.setdefault(place, [])
            if not any(np.array_equal(ids, other) for other in known):
                known.append(ids)
    kept, reach = [], 0
    for start, stop in sorted(found, key=lambda place: (place[0], -place[1])):
        if stop > reach and any(c.isalnum() for c in text[start:stop]):
            kept.append(Match(start, stop, tuple(found[start, stop])))
            reach = stop
    return kept


def log_probability(match: Match, counts: np.ndarray) -> float:
    """The sum of the log unigram probabilities of a span's tokens, in nats, of its likelier form.

    Args:
      counts: int64 [V]: how often each token occurs in all that was asked.
    """
    total = math.log(counts.sum())
    return max(float((np.log(counts[ids]) - total).sum()) for ids in match.forms)


def rarest(found: Sequence[Match], counts: np.ndarray, tokens: int) -> list[Match]:
    """The ceil(0.05 L) spans with the lowest unigram probability, in the order of the text.

    Args:
      counts: int64 [V].
      tokens: L, how many tokens the text has.
    """
    most = math.ceil(DENSITY * tokens)
    kept = sorted(found, key=lambda match: (log_probability(match, counts), match.start))[:most]
    return sorted(kept)  # places differ, so that ids are never compared


def stretches(places: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Groups spans that overlap, by their numbers, in the order of the text.

    They are shown as one highlight. They stay apart everywhere else: what two spans cover together
    may stand nowhere.
    """
    groups: list[list[int]] = []
    reach = 0
    for number in sorted(range(len(places)), key=lambda i: places[i]):
        start, stop = places[number]
        if groups and start < reach:
            groups[-1].append(number)
        else:
            groups.append([number])
        reach = max(reach, stop)
    return groups
