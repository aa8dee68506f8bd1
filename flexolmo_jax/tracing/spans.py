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
_NOT_FIRST = frozenset(""",.;:!?…%)]}’”»、。，；：！？」』）-–—""")  # no span begins with one
_APOSTROPHES = (ord("'"), ord("’"))
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
    characters = _Characters(text)
    ids, offsets = encode(text)
    if not len(ids):
        return [characters.asked(ids, np.zeros((0, 2), np.int64))]
    forms = [characters.asked(ids, np.array(offsets, np.int64))]
    pieces, places = [], []
    for start, stop in characters.sentences():
        space = "" if text[start - 1 : start] == " " else " "
        ids, offsets = encode(space + text[start:stop])
        pieces.append(ids)
        shift = start - len(space)
        places.append(np.maximum(np.array(offsets, np.int64).reshape(-1, 2) + shift, start))
    if pieces:
        forms.append(characters.asked(np.concatenate(pieces), np.concatenate(places)))
    return forms


class _Characters:
    """What each character of a text is, and what follows for its tokens. C characters."""

    def __init__(self, text: str):
        self.text, count = text, len(text)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        different, which = np.unique(codes, return_inverse=True)
        own = [_kind(chr(code)) for code in different.tolist()]
        kinds = np.array(own, bool).reshape(-1, 4)[which]
        is_space, joins, is_mark, self.not_first = kinds.T
        between = np.isin(codes, _APOSTROPHES)  # don't
        between[1:-1] &= joins[:-2] & joins[2:]
        between[:1] = between[-1:] = False
        joins = joins | between
        # bool [C + 1]: this place, before a character, is in the middle of a word.
        self.inside = np.zeros(count + 1, bool)
        self.inside[1:-1] = (joins[:-1] & joins[1:]) | is_mark[1:]
        here = np.arange(count)
        # int64 [C + 1]: the first character from here on, and the last up to here, that is shown.
        self.next = np.append(np.where(is_space, count, here), count)
        self.next = np.minimum.accumulate(self.next[::-1])[::-1]
        self.last = np.maximum.accumulate(np.append(0, np.where(is_space, 0, here + 1)))
        self.ends = np.array([match.end() for match in _END.finditer(text)], np.int64)

    def sentences(self) -> list[tuple[int, int]]:
        """Where each sentence begins and ends, without white space before it."""
        found: list[tuple[int, int]] = []
        start, count = 0, len(self.text)
        for stop in [*self.ends.tolist(), *[count] * (count not in self.ends)]:
            begin = int(self.next[start])
            if begin < stop:
                found.append((begin, stop))
            elif found:  # lines end behind it: some tokenizers join them to the point
                found[-1] = (found[-1][0], stop)
            start = stop
        return found

    def asked(self, ids: np.ndarray, places: np.ndarray) -> Asked:
        """Tokens with where spans may begin and end.

        Args:
          ids: uint32 [L].
          places: int64 [L, 2], in order: characters [start, stop) of each.
        """
        starts = np.minimum(self.next[places[:, 0]], places[:, 1])
        stops = np.maximum(self.last[places[:, 1]], places[:, 0])
        is_shown = starts < stops
        # Tokens that share a character, of which each is some bytes, stay together.
        is_joined = places[1:, 0] < places[:-1, 1]
        alone = np.zeros(min(len(ids), 1), bool)
        not_first = np.append(self.not_first, True)[starts]
        begins = ~not_first & ~self.inside[starts] & ~np.concatenate([alone, is_joined])
        ends = ~self.inside[stops] & ~np.concatenate([is_joined, alone])
        # The token behind the one that reaches the next end of a sentence or a line.
        border = np.append(self.ends, len(self.text))[
            np.searchsorted(self.ends, places[:, 0], side="right")
        ]
        cut = np.searchsorted(stops, border, side="right")
        return Asked(
            np.asarray(ids, np.uint32), starts, stops, begins & is_shown, ends & is_shown, cut
        )


def _kind(character: str) -> tuple[bool, bool, bool, bool]:
    """White space; a part of a word, if its neighbour is one; a mark; no span begins with it."""
    category = unicodedata.category(character)[0]
    joins = character == "_" or (category in "LNM" and not _UNSPACED.match(character))
    return character.isspace(), joins, category == "M", character in _NOT_FIRST


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
    found: dict[tuple[int, int], dict[bytes, np.ndarray]] = {}
    for form, lengths in zip(asked, longest, strict=True):
        starts, stops = form.starts.tolist(), form.stops.tolist()
        for first, last in maximal_spans(form, lengths):
            ids = form.ids[first:last]
            found.setdefault((starts[first], stops[last - 1]), {})[ids.tobytes()] = ids
    kept, reach = [], 0
    for start, stop in sorted(found, key=lambda place: (place[0], -place[1])):
        if stop > reach and any(c.isalnum() for c in text[start:stop]):
            kept.append(Match(start, stop, tuple(found[start, stop].values())))
            reach = stop
    return kept


def log_probabilities(found: Sequence[Match], counts: np.ndarray) -> np.ndarray:
    """The sum of the log unigram probabilities of each span's tokens, of its likeliest form.

    Args:
      counts: int64 [V]: how often each token occurs in all that was asked.

    Returns:
      float64 [spans], in nats.
    """
    forms = [ids for match in found for ids in match.forms]
    if not forms:
        return np.zeros(0)
    sizes, numbers = [len(ids) for ids in forms], [len(match.forms) for match in found]
    logs = np.log(counts[np.concatenate(forms)]) - math.log(counts.sum())
    sums = np.add.reduceat(logs, np.cumsum([0, *sizes[:-1]]))
    return np.maximum.reduceat(sums, np.cumsum([0, *numbers[:-1]]))


def log_probability(match: Match, counts: np.ndarray) -> float:
    """As `log_probabilities`, of one span."""
    return float(log_probabilities([match], counts)[0])


def rarest(found: Sequence[Match], counts: np.ndarray, tokens: int) -> list[Match]:
    """The ceil(0.05 L) spans with the lowest unigram probability, in the order of the text.

    Where the text repeats one of them, every place is kept, and counts as one.

    Args:
      counts: int64 [V].
      tokens: L, how many tokens the text has.
    """
    most = math.ceil(DENSITY * tokens)
    words = [match.forms[0].tobytes() for match in found]
    order = np.argsort(log_probabilities(found, counts), kind="stable").tolist()
    kept = set(list(dict.fromkeys(words[i] for i in order))[:most])
    return [match for match, own in zip(found, words, strict=True) if own in kept]


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
