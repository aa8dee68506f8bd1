"""The public text that an anchor package brings, for owners to fit router rows against."""

import itertools
from collections.abc import Iterator

import numpy as np

from flexolmo_jax.config import DataConfig
from flexolmo_jax.data.sources import Document, is_heldout, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer

DOCUMENTS = 10_000  # of the training text, from which the sample is drawn
BYTES = 2000  # of a document, so that the sample covers more of them


def training_documents(data: str, config: DataConfig) -> Iterator[Document]:
    """The documents of a source that are not held out.

    Args:
      data: as in `read_documents`.
      config: the fields of its rows, and the held-out share.
    """
    documents = read_documents(data, text_field=config.text_field, group_field=config.group_field)
    return (d for d in documents if not is_heldout(d, config.heldout))


def shuffled_training_documents(data: str, config: DataConfig) -> list[Document]:
    """The first DOCUMENTS of `training_documents` at most, in random order, always the same."""
    documents = list(itertools.islice(training_documents(data, config), DOCUMENTS))
    return [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]


def public_sample(documents: list[Document], tokenizer: Tokenizer, tokens: int) -> list[str]:
    """The first documents, up to `tokens` tokens in all; long documents are cut at BYTES."""
    texts: list[str] = []
    for document in documents:
        if tokens <= 0:
            break
        text = document.text.encode()[:BYTES].decode(errors="ignore")
        texts.append(text)
        tokens -= len(tokenizer.encode_documents([text])[0])
    return texts
