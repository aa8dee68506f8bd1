"""Documents become windows of fixed length: the token stream is cut; only the last is padded."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.data.pieces import PIECE, in_pieces
from flexolmo_jax.data.sources import Document
from flexolmo_jax.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 8 * PIECE  # encoded at a time


class Window(NamedTuple):
    """S + 1 tokens: the first S are read, the last S are predicted.

    A window starts with the token the one before ended with, so every token is predicted once.
    """

    tokens: np.ndarray  # int32 [S + 1]
    segments: np.ndarray  # int32 [S + 1]: 1, 2, ... by document; 0 is padding


def tokenized(
    documents: Iterable[Document], tokenizer: Tokenizer, whole: bool = False
) -> Iterator[np.ndarray]:
    """Ids of each document, opened by the separator: int32 [tokens]; `whole` as encode_documents.

    Documents are encoded in batches, for speed, of limited size, to bound memory. A long document
    is encoded in pieces where that gives the same tokens.
    """
    for batch in together(documents):
        if len(batch) == 1 and len(batch[0].text) > BATCH_CHARACTERS:
            yield _of_long(batch[0], tokenizer, whole)
            continue
        names = [document.where for document in batch]
        for ids in tokenizer.encode_documents([d.text for d in batch], names, whole):
            yield np.asarray(ids, np.int32)


def together(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Batches of at most 512 documents and BATCH_CHARACTERS; a longer document is one by itself."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and (len(batch) == 512 or size + len(document.text) > BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
    if batch:
        yield batch


def _of_long(document: Document, tokenizer: Tokenizer, whole: bool) -> np.ndarray:
    parts = [np.asarray([tokenizer.separator], np.int32)]
    pieces = in_pieces(document.text, tokenizer.json)
    for start in range(0, len(pieces), 8):
        some = pieces[start : start + 8]
        encoded = tokenizer.encode_documents(some, [document.where] * len(some), whole)
        parts += [np.asarray(ids[1:], np.int32) for ids in encoded]  # each opened by a separator
    return np.concatenate(parts)


def windows(
    tokenized_documents: Iterable[Sequence[int] | np.ndarray], length: int, separator: int
) -> Iterator[Window]:
    """Cuts the concatenated documents into windows.

    Args:
      tokenized_documents: each opened by `separator`.
      length: S, tokens that a window reads.
      separator: also closes the stream, so that the end of the last document is predicted too.
    """
    tokens = np.zeros(0, np.int32)
    owners = np.zeros(0, np.int32)  # the number of each token's document
    last = 0
    for last, document in enumerate(tokenized_documents, 1):
        tokens = np.concatenate([tokens, np.asarray(document, np.int32)])
        owners = np.concatenate([owners, np.full(len(document), last, np.int32)])
        start = 0
        while len(tokens) - start > length:
            end = start + length + 1
            yield _window(tokens[start:end], owners[start:end])
            start += length
        tokens, owners = (
            tokens[start:].copy(),
            owners[start:].copy(),
        )  # at most S + 1
    tokens, owners = np.append(tokens, separator), np.append(owners, last + 1)
    if last and len(tokens) > 1:
        padding = length + 1 - len(tokens)
        window = _window(
            np.append(tokens, np.full(padding, separator)),
            np.append(owners, np.full(padding, last + 1)),
        )
        window.segments[len(tokens) :] = 0
        yield window


def _window(tokens: np.ndarray, owners: np.ndarray) -> Window:
    return Window(tokens.astype(np.int32), (owners - owners[0] + 1).astype(np.int32))
