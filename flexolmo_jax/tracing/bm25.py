"""BM25: how much the words of a few texts are those of a query.

The library bm25s computes the same, and a test compares the two. It is not used here, because
importing it computes something with JAX, which takes a machine's accelerator.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

K1, B = 1.5, 0.75  # the defaults of bm25s

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return _WORD.findall(text.lower())


def bm25(query: str, texts: Sequence[str]) -> np.ndarray:
    """Scores of texts against a query; word frequencies are those among these texts.

    The formula is Lucene's (Robertson and Zaragoza 2009, without the constant factor k1 + 1).

    Returns:
      float64 [texts], 0 or more.
    """
    asked = Counter(words(query))
    lengths, scores = np.zeros(len(texts)), np.zeros(len(texts))
    places: dict[str, dict[int, int]] = {}  # of each asked word: how often each text has it
    for number, text in enumerate(texts):
        own = Counter(words(text))
        lengths[number] = own.total()
        for word in own.keys() & asked.keys():
            places.setdefault(word, {})[number] = own[word]
    if not lengths.any():
        return scores
    norm = K1 * (1 - B + B * lengths / lengths.mean())
    for word, times in asked.items():
        having = list(places.get(word, ()))
        if having:
            frequency = np.array(list(places[word].values()), np.float64)
            idf = np.log1p((len(texts) - len(having) + 0.5) / (len(having) + 0.5))
            scores[having] += times * idf * frequency / (frequency + norm[having])
    return scores
