"""What an evidence head says on its own: it is a bigram model of its owner's text.

It needs no context but the token before, and no layer. Everyone who holds the package and its
anchor can compute log p_e(x) - log p_public(x) of any passage, and read off the words that the
owner's text has more of than public text.
"""

import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flexolmo_jax.audits.scoring import ROWS, padded, tokenizer_of
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.package import Package
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.modeling.evidence import log_probabilities
from flexolmo_jax.modeling.experts import with_same_parts
from flexolmo_jax.modeling.heads import LowRankHead, delta
from flexolmo_jax.modeling.transformer import Backbone

# Steps from the uniform distribution to the one that the bigram model's own text would have.
POWER_STEPS = 20
MAX_LOGITS = 2**24  # of the transitions that are in memory at once
TINY = float(np.finfo(np.float32).tiny)


class Bigrams(NamedTuple):
    """The bigram models of public text and of an owner's text.

    Attributes:
      heads: the public evidence head and the owner's, [1, 2, ...]; the public one is zeros if the
        anchor has none.
      model: what they stand on: its embedding, last norm and output head.
    """

    heads: LowRankHead
    model: FlexOlmo

    @classmethod
    def of(cls, package: Path, anchor: Path, model: FlexOlmo) -> "Bigrams | None":
        """Reads the heads of a package and its anchor; None if the package has no evidence head.

        Args:
          package: the expert's.
          anchor: that it was trained beside.
          model: loaded with both, so that their files are checked.
        """
        opened = Package.open(package, "expert")
        if "evidence" not in opened.weights.parts:
            return None
        separator = opened.manifest.get("separator")
        public = read_anchor(anchor, on_disk=True, separator=separator).weights.public
        heads = [stack.evidence for stack in with_same_parts([public, opened.weights])]
        joined = jax.tree.map(
            lambda *x: jnp.concatenate([np.asarray(leaf) for leaf in x], axis=1), *heads
        )
        return cls(joined, model)

    def logs(self, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of all tokens but each sequence's first, concatenated.

        Returns:
          float64, of the owner's bigram model, and of the public one.
        """
        found: list[np.ndarray] = []
        for first in range(0, len(sequences), ROWS):
            batch = sequences[first : first + ROWS]
            scores = _scores(self.heads, self.model.backbone, padded(batch), self.model.config)
            scores = np.asarray(scores, np.float64)
            found += [scores[:, i, : len(ids) - 1] for i, ids in enumerate(batch)]
        public, own = np.concatenate(found, axis=1)
        return own, public

    def frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """How often each token occurs in text that the bigram models generate.

        Returns:
          float32 [V], of the owner's model, and of the public one.
        """
        size = self.model.config.vocab_size
        found = np.full((2, size), 1 / size, np.float32)
        for _ in range(POWER_STEPS):
            after = np.zeros_like(found)
            for tokens, logs in self.transitions():
                after += np.einsum("et,etv->ev", found[:, tokens], np.exp(logs))
            found = after
        return found[1], found[0]

    def transitions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some tokens [T], and log-probabilities of the next one, float32 [2, T, V]; until all.

        The public model is the first of the two.
        """
        size = self.model.config.vocab_size
        count = max(1, MAX_LOGITS // (2 * size))
        for first in range(0, size, count):
            tokens = np.arange(first, min(first + count, size))
            yield (
                tokens,
                np.asarray(
                    _next_tokens(self.heads, self.model.backbone, tokens, self.model.config)
                ),
            )


class Revealed(NamedTuple):
    """A token or a bigram that an owner's text has more of than public text."""

    text: str
    probability: float  # in the owner's bigram model; of a bigram, of both tokens
    times: float  # more likely than in the public model; of a bigram, given its first token
    nats: float  # probability * log(times): its part of the divergence of the two models


def revealed(bigrams: Bigrams, count: int) -> dict[str, list[Revealed]]:
    """The tokens and the bigrams that tell an owner's bigram model most from the public one.

    A token's part is f(x) log(f(x) / f_public(x)), of its frequencies in text that the models
    generate; a bigram's f(x) p(y|x) log(p(y|x) / p_public(y|x)). Rare words do not count much,
    however much their probability rose: most of them rose by chance.

    Args:
      bigrams: the two models.
      count: of each list.

    Returns:
      "tokens" and "bigrams", the largest parts first.
    """
    own, public = bigrams.frequencies()
    pairs = (
        _bigrams(bigrams.model, own[tokens], tokens, logs, count)
        for tokens, logs in bigrams.transitions()
    )
    best = heapq.nlargest(count, itertools.chain.from_iterable(pairs), key=lambda one: one.nats)
    return {"tokens": _tokens(bigrams.model, own, public, count), "bigrams": best}


def _tokens(model: FlexOlmo, own: np.ndarray, public: np.ndarray, count: int) -> list[Revealed]:
    decode, times = tokenizer_of(model).decode, own / np.maximum(public, TINY)
    parts = own * np.log(np.maximum(times, TINY))
    return [
        Revealed(decode([int(i)]), float(own[i]), float(times[i]), float(parts[i]))
        for i in np.argsort(-parts)[:count]
    ]


def _bigrams(
    model: FlexOlmo, frequencies: np.ndarray, first: np.ndarray, logs: np.ndarray, count: int
) -> list[Revealed]:
    """Those of some first tokens: their frequencies [T], ids [T], and `transitions` [2, T, V]."""
    decode, rises = tokenizer_of(model).decode, logs[1] - logs[0]
    joint = frequencies[:, None] * np.exp(logs[1])
    parts = joint * rises
    largest = np.argpartition(-parts, min(count, parts.size - 1), axis=None)[:count]
    return [
        Revealed(
            decode([int(first[row]), int(second)]), float(joint[row, second]),
            float(np.exp(rises[row, second])), float(parts[row, second]),
        )
        for row, second in zip(*np.unravel_index(largest, parts.shape), strict=True)
    ]  # fmt: skip


@functools.partial(jax.jit, static_argnames="config")
def _scores(heads, backbone: Backbone, tokens, config) -> Float[Array, "2 B S"]:
    hidden = backbone.norm(backbone.embed[...][tokens[:, :-1]], config.norm_eps)
    matrix = backbone.head_matrix(config)
    return log_probabilities(heads, hidden, matrix, tokens[:, 1:], config.loss_chunk)


@functools.partial(jax.jit, static_argnames="config")
def _next_tokens(heads, backbone: Backbone, tokens, config) -> Float[Array, "2 T V"]:
    hidden = backbone.norm(backbone.embed[...][tokens], config.norm_eps)
    logits = backbone.logits(hidden, config)
    own = jax.lax.map(lambda head: logits + delta(hidden, *head), heads.experts())
    return jax.nn.log_softmax(own, axis=-1)
