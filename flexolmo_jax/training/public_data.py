"""Public text that an owner's router rows are fitted against."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flexolmo_jax.config import ExpertTraining
from flexolmo_jax.data.batches import Batch, stacked
from flexolmo_jax.data.sources import Document, read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.federation.anchor import LoadedAnchor

NO_TEXT = "the public text to fit router rows against is empty; name another with --public"


def public_text_of(
    anchor: LoadedAnchor, public: str | None, where: Path, config: ExpertTraining
) -> Iterable[str]:
    """The public documents to fit router rows against.

    Args:
      anchor: its own public text is the default.
      public: public text that the owner names instead, as `read_documents` takes it. Its field is
        that of the owner's own text, or "text".
      where: the anchor's path, for messages.
      config: the stage's config.

    Raises:
      ValueError: there is none, but it is needed; or it cannot be read.
    """
    if public is not None:
        field = _field_of(public, config.data.text_field)
        return (d.text for d in read_documents(public, text_field=field))
    if not anchor.public_text and config.gating == "fixed":
        raise ValueError(
            f"{where}: this anchor has no public text to fit the router rows against; name some "
            "with --public"
        )
    return anchor.public_text


def _field_of(source: str, expected: str) -> str:
    """The field that holds a source's text: the expected one, or "text"."""
    try:
        next(read_documents(source, text_field=expected))
    except ValueError as error:
        if expected == "text":
            raise
        try:
            next(read_documents(source))
        except ValueError:
            raise error from None
        return "text"
    return expected


def public_batch(texts: Iterable[str], tokenizer: Tokenizer, length: int, count: int) -> Batch:
    """The first windows of public texts as one batch.

    Args:
      texts: public documents.
      tokenizer: of the anchor.
      length: S, tokens per window.
      count: maximum number of windows.

    Raises:
      ValueError: there is no text.
    """
    documents = (Document(text, text) for text in texts)
    cut = windows(tokenized(documents, tokenizer), length, tokenizer.separator)
    batch = next(stacked(itertools.islice(cut, count), count), None)
    if batch is None:
        raise ValueError(NO_TEXT)
    return batch


def public_units(
    texts: Iterable[str], tokenizer: Tokenizer, *, length: int, max_windows: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first public documents as units of privacy; stops reading after `tokens` tokens.

    Args:
      texts: public documents.
      tokenizer: of the anchor.
      length: S, tokens per window.
      max_windows: W, windows per document.
      tokens: total of all units.

    Returns:
      tokens and segments, int32 [documents, W, S + 1] each.

    Raises:
      ValueError: there is no text, or a text that the model cannot read.
    """
    units: list[np.ndarray] = []
    for text in texts:
        if tokens <= 0:
            break
        cut = windows(tokenized([Document(text, text)], tokenizer), length, tokenizer.separator)
        unit = np.zeros((2, max_windows, length + 1), np.int32)
        for index, window in enumerate(itertools.islice(cut, max_windows)):
            unit[:, index] = window
        units.append(unit)
        tokens -= int((unit[1] > 0).sum())
    if not units:
        raise ValueError(NO_TEXT)
    tokens_of_units, segments = np.stack(units, axis=1)
    return tokens_of_units, segments
