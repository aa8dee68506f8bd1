"""What is known of prompts that were read, for requests whose prompts begin alike."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Prefix(NamedTuple):
    """What is known of the beginning of a prompt.

    Attributes:
      sequence: of the network, a batch of one.
      read: its tokens.
      logits, shares: after its last token, if it is the whole prompt.
    """

    sequence: Any
    read: int
    logits: jax.Array | None
    shares: jax.Array | np.ndarray | None


class Prefixes:
    """Prefixes by their tokens and experts; the oldest go first.

    The experts belong to the key: a mask changes keys and values of every layer after the first.

    Args:
      count: how many are kept; 0: none.
      chunk: beginnings end at multiples of these tokens, or with the prompt.
    """

    def __init__(self, count: int, chunk: int):
        self._count, self._chunk = count, chunk
        self._known: collections.OrderedDict[tuple, Prefix] = collections.OrderedDict()

    def longest(self, prompt: Sequence[int], allowed: np.ndarray) -> Prefix | None:
        """A copy of what is known of the longest beginning of a prompt, or None."""
        if not self._count:
            return None
        prompt, chunk = tuple(prompt), self._chunk
        for end in [len(prompt), *range(len(prompt) // chunk * chunk, 0, -chunk)]:
            key = (prompt[:end], end == len(prompt), allowed.tobytes())
            if key in self._known:
                self._known.move_to_end(key)
                known = self._known[key]
                return known._replace(sequence=jax.tree.map(jnp.copy, known.sequence))
        return None

    def keep(self, prompt: Sequence[int], allowed: np.ndarray, known: Prefix) -> None:
        """Keeps a copy of what is known of a prompt."""
        if not self._count:
            return
        key = (tuple(prompt)[: known.read], known.logits is not None, allowed.tobytes())
        self._known[key] = known._replace(sequence=jax.tree.map(jnp.copy, known.sequence))
        while len(self._known) > self._count:
            self._known.popitem(last=False)
