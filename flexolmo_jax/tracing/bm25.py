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
    counts = [Counter(words(text)) for text in texts]
    lengths = np.array([count.total() for count in counts], np.float64)
    scores = np.zeros(len(texts))
    if not lengths.any():
        return scores
    norm = K1 * (1 - B + B * lengths / lengths.mean())
    for word, times in Counter(words(query)).items():
        frequency = np.array([count[word] for count in counts], np.float64)
        having = np.count_nonzero(frequency)
        if having:
            idf = np.log1p((len(texts) - having + 0.5) / (having + 0.5))
            scores += times * idf * frequency / (frequency + norm)
    return scores
