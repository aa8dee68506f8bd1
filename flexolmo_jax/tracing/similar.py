"""Passages that are alike in meaning: static word vectors find them, and their words rank them."""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from flexolmo_jax.data.domain_embedding import WordVectors, unit
from flexolmo_jax.runtime.console import progress
from flexolmo_jax.tracing.bm25 import bm25
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.results import Passage

# What `flexolmo study trace-similar` measured (docs/tracing.md); shown wherever passages are.
SIMILAR_NOTE = (
    "of passages with half of their words dropped 100% are among the first ten, of those that are "
    "only synonyms 40%"
)
WIDTH = 64  # tokens of a passage; the next one begins in its middle
CANDIDATES = 100  # passages that word vectors find, for the ranking by words
_BATCH = 4096  # halves of passages in memory at a time, and those of one document more
_FUSION = 60  # of reciprocal rank fusion (Cormack et al. 2009)


def similar_passages(
    text: str, indexes: Sequence[Index], query: str, most: int, named: Sequence[Passage] = ()
) -> list[Passage]:
    """The passages most like a text, best first, at most one of a document.

    Args:
      text: what was asked about.
      query: against which passages are ranked by BM25: the prompt and the text.
      most: how many.
      named: passages of documents that hold spans of the text verbatim; these are left out.

    Raises:
      ValueError: the package wordllama is not installed.
    """
    [passages] = nearest_passages([text], indexes)
    return fused(passages, query, named)[:most]


def nearest_passages(texts: Sequence[str], indexes: Sequence[Index]) -> list[list[Passage]]:
    """The `CANDIDATES` passages of all documents whose word vectors are nearest to each text's.

    Every document is read and embedded at each call, a few thousand pieces at a time, so that
    memory stays bounded and an index holds no second copy of its text.

    Returns:
      of each text, passages by falling cosine of the mean word vectors.

    Raises:
      ValueError: the package wordllama is not installed.
    """
    vectors = WordVectors()
    targets = vectors.means(texts)
    best: list[list[tuple[float, int, int, int]]] = [[] for _ in texts]  # heaps, the farthest first
    total = sum(index.num_tokens for index in indexes)
    with progress("similar passages", total, unit="token") as bar:
        for number, index in enumerate(indexes):
            for places, pieces in _batches(index):
                cosines = _passage_vectors(places, vectors.sums(pieces)[0]) @ targets.T
                for own, heap in zip(cosines.T, best, strict=True):
                    for row in np.argsort(-own)[:CANDIDATES].tolist():
                        heapq.heappush(heap, (float(own[row]), -number, *places[row]))
                        if len(heap) > CANDIDATES:
                            heapq.heappop(heap)
                bar.update(min(total, bar.done + len(places) * WIDTH // 2))
    return [
        [_passage(indexes[-number], *place) for _, number, *place in sorted(heap)[::-1]]
        for heap in best
    ]


def _batches(index: Index) -> Iterator[tuple[list[tuple[int, int]], list[str]]]:
    """Halves of passages, by document and first token, and their texts, some at a time."""
    places: list[tuple[int, int]] = []
    ids: list[list[int]] = []
    for document in index.numbers():
        tokens = index.read(document, 0, index.document(document).tokens).tolist()
        starts = range(0, len(tokens), WIDTH // 2)
        places += [(document, start) for start in starts]
        ids += [tokens[start : start + WIDTH // 2] for start in starts]
        if len(ids) >= _BATCH:
            yield places, index.tokenizer.decode_batch(ids)
            places, ids = [], []
    if ids:
        yield places, index.tokenizer.decode_batch(ids)


def _passage_vectors(places: list[tuple[int, int]], sums: np.ndarray) -> np.ndarray:
    """Unit vectors of passages, each of a half and the next one, if its document has one.

    Args:
      places: of the halves, by document and first token.
      sums: float32 [halves, 256] of their word vectors.

    Returns:
      float32 [halves, 256].
    """
    documents = np.array([document for document, _ in places])
    passages = sums.copy()
    continues = np.flatnonzero(documents[1:] == documents[:-1])
    passages[continues] += sums[continues + 1]
    return unit(passages)


def _passage(index: Index, document: int, start: int) -> Passage:
    record = index.document(document)
    text = index.tokenizer.decode(index.read(document, start, start + WIDTH).tolist())
    about = (index.owner, record.id, record.source, record.licence, record.group)
    return Passage(*about, match=text.strip("\ufffd").strip())


def fused(passages: list[Passage], query: str, named: Sequence[Passage]) -> list[Passage]:
    """The best passage of each document, by reciprocal rank fusion of word vectors and BM25.

    Args:
      passages: in the order of their word vectors' similarity.
    """
    scores = bm25(query, [passage.match for passage in passages])
    ranks = np.argsort(np.argsort(-scores, kind="stable"))
    fused = [1 / (_FUSION + i) + 1 / (_FUSION + rank) for i, rank in enumerate(ranks.tolist())]
    seen = {(passage.owner, passage.document) for passage in named}
    kept = []
    for i in sorted(range(len(passages)), key=lambda i: -fused[i]):
        key = (passages[i].owner, passages[i].document)
        if key not in seen:
            seen.add(key)
            kept.append(passages[i]._replace(score=round(float(scores[i]), 4)))
    return kept
