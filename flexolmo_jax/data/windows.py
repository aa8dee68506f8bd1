"""Documents to windows of fixed length: a stream of tokens, cut; no padding but in the last one."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from flexolmo_jax.data.sources import Document
from flexolmo_jax.data.tokenizer import Tokenizer


class Window(NamedTuple):
    """S + 1 tokens: the first S are read, the last S are predicted.

    A window starts with the token the one before ended with, so every token is predicted once.
    """

    tokens: np.ndarray  # int32 [S + 1]
    segments: np.ndarray  # int32 [S + 1]: 1, 2, ... by document; 0 is padding


def tokenized(
    documents: Iterable[Document], tokenizer: Tokenizer, whole: bool = False
) -> Iterator[list[int]]:
    """Ids of each document, opened by the separator; `whole` as in `encode_documents`."""
    documents = iter(documents)
    while batch := list(itertools.islice(documents, 512)):
        names = [document.where for document in batch]
        yield from tokenizer.encode_documents([d.text for d in batch], names, whole)


def windows(
    tokenized_documents: Iterable[list[int]], length: int, separator: int
) -> Iterator[Window]:
    """Cuts documents, laid end to end, into windows.

    Args:
      tokenized_documents: each opened by `separator`.
      length: S, tokens that a window reads.
      separator: also closes the stream, so that the end of the last document is predicted too.
    """
    tokens: list[int] = []
    owners: list[int] = []  # the number of the document that each token is of
    last = 0
    for last, document in enumerate(tokenized_documents, 1):
        tokens.extend(document)
        owners.extend([last] * len(document))
        start = 0
        while len(tokens) - start > length:
            end = start + length + 1
            yield _window(tokens[start:end], owners[start:end])
            start += length
        del tokens[:start], owners[:start]  # once a document: a book has many windows
    tokens.append(separator)
    owners.append(last + 1)
    if last and len(tokens) > 1:
        padding = length + 1 - len(tokens)
        window = _window(tokens + [separator] * padding, owners + [last + 1] * padding)
        window.segments[len(tokens) :] = 0
        yield window


def _window(tokens: list[int], owners: list[int]) -> Window:
    segments = np.asarray(owners, np.int32)
    return Window(np.asarray(tokens, np.int32), segments - segments[0] + 1)
