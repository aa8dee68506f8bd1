"""A router without biases and memory in place of one that has them, and what the change costs."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.data.sources import Document
from flexolmo_jax.evaluation.bits_per_byte import score
from flexolmo_jax.federation.anchor import LoadedAnchor
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.training.public_data import public_batch
from flexolmo_jax.training.router_fit.inputs import whitened_by

FIT_WINDOWS, LOGIT_WINDOWS = 256, 4


class Cost(NamedTuple):
    """What a changed router costs on the anchor's public text.

    Attributes:
      before, after: bits per byte.
      logit: the largest change of a logit.
      largest: the largest logit, in size, before.
    """

    before: float
    after: float
    logit: float
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.before:.4f} bits per byte before, {self.after:.4f} after "
            f"({self.after - self.before:+.4f}); the largest change of a logit is "
            f"{self.logit:.2g}, the largest logit {self.largest:.2g}"
        )


def fold_biases(model: FlexOlmo, anchor: LoadedAnchor) -> FlexOlmo:
    """The model with its router biases folded into the rows, for a router that has none.

    To each row is added, times the bias, the vector whose product with an input of the layer is
    nearest to 1 (least squares, over the anchor's public text).

    Args:
      model: merged.
      anchor: its anchor, in memory.

    Raises:
      ValueError: the anchor has no public text.
    """
    if anchor.tokenizer is None or not anchor.public_text:
        raise ValueError("the anchor has no public text to fold biases by")
    text = public_batch(anchor.public_text, anchor.tokenizer, anchor.config.max_length, FIT_WINDOWS)
    inputs = whitened_by(text, anchor.weights, anchor.config)
    constant = jnp.asarray([layer.constant for layer in inputs], jnp.float32)  # [L, D]
    experts = jax.tree.map(jnp.array, model.experts)
    bias = jnp.minimum(experts.router.bias[...], 0.0)[..., None]  # [L, E, 1]
    row = experts.router.row[...]
    experts.router.row[...] = (row + bias * constant[:, None]).astype(row.dtype)
    experts.router.bias[...] = jnp.zeros_like(experts.router.bias[...])
    return dataclasses.replace(model, experts=experts)


def without_memory(model: FlexOlmo) -> FlexOlmo:
    """The model, its router reading each token alone."""
    return dataclasses.replace(model, config=model.config.replace(memory=None))


def cost(before: FlexOlmo, after: FlexOlmo, anchor: LoadedAnchor, without: list[str]) -> Cost:
    """What the change from one model to the other costs on the anchor's public text.

    Args:
      before, after: with the same experts and tokenizer.
      anchor: with public text.
      without: experts that are switched off in both.

    Raises:
      ValueError: the anchor has no public text.
    """
    if anchor.tokenizer is None or not anchor.public_text:
        raise ValueError("the anchor has no public text to measure the change of the router on")
    documents = [Document(text, text) for text in anchor.public_text]
    bits, changed = (score(x, documents, without=without).bits_per_byte for x in (before, after))
    length = min(anchor.config.max_length, 512)
    text = public_batch(anchor.public_text, anchor.tokenizer, length, LOGIT_WINDOWS)
    real = np.asarray(text.segments) > 0
    old, new = (np.asarray(x.logits(text.tokens, without=without))[real] for x in (before, after))
    return Cost(bits, changed, float(np.abs(new - old).max()), float(np.abs(old).max()))
