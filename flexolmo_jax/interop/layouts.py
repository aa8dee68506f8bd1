"""Where each of our leaves is stored in a Hugging Face directory, and how it is transposed.

A leaf is filled from, or written to, one stored tensor at a time.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.config import ModelConfig


class Source(NamedTuple):
    """Where a leaf's numbers are stored, and how they are transposed into ours."""

    key: str  # fills leaf[l, e], leaf[l] or the whole leaf, as it has {l} and {e}
    axes: str  # theirs -> ours, letters as in modeling/layers.py; (N H) is one axis of theirs
    half: int | None = None  # of a leading axis of 2, where one tensor holds two leaves
    experts: tuple[int, ...] | None = None  # theirs, in the order of our stack; None: all
    rank: int = 0  # R, of a factor

    def places(self, config: ModelConfig) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index into the leaf, name of the tensor that goes there), for all of the leaf."""
        experts = range(config.num_experts) if self.experts is None else self.experts
        numbers = {"l": range(config.num_layers), "e": experts}
        used = [letter for letter in numbers if f"{{{letter}}}" in self.key]
        for place in itertools.product(*(range(len(numbers[letter])) for letter in used)):
            theirs = (numbers[letter][at] for letter, at in zip(used, place, strict=True))
            yield place, self.key.format(**dict(zip(used, theirs, strict=True)))

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """What each of the stored tensors must have."""
        sizes = {**sizes, "R": self.rank}
        axes = re.findall(r"\(.*?\)|\w", self.axes.split(" -> ")[0])
        return tuple(math.prod(sizes[x] for x in re.findall(r"\w", axis)) for axis in axes)

    def transposed(self, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """A stored tensor as a part of our leaf; a view."""
        theirs, ours = (re.findall(r"\w", side) for side in self.axes.split(" -> "))
        sizes = {**sizes, "R": self.rank}
        tensor = tensor.reshape([sizes[x] for x in theirs])
        tensor = tensor.transpose([theirs.index(x) for x in ours])
        if self.experts is not None and "{e}" not in self.key:
            tensor = tensor[list(self.experts)]
        return tensor if self.half is None else tensor[self.half]

    def stored(self, part: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """The inverse of `transposed`, where one tensor holds one part of a leaf."""
        theirs, ours = (re.findall(r"\w", side) for side in self.axes.split(" -> "))
        part = part.transpose([ours.index(x) for x in theirs])
        return np.ascontiguousarray(part.reshape(self.shape(sizes)))


_LAYER = "model.layers.{l}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

BACKBONE = {
    "embed": Source("model.embed_tokens.weight", "V D -> V D"),
    "layers.attention.q": Source(_ATTENTION + "q_proj.weight", "(N H) D -> D N H"),
    "layers.attention.k": Source(_ATTENTION + "k_proj.weight", "(K H) D -> D K H"),
    "layers.attention.v": Source(_ATTENTION + "v_proj.weight", "(K H) D -> D K H"),
    "layers.attention.o": Source(_ATTENTION + "o_proj.weight", "D (N H) -> N H D"),
    "layers.attention.q_norm.scale": Source(_ATTENTION + "q_norm.weight", "(N H) -> N H"),
    "layers.attention.k_norm.scale": Source(_ATTENTION + "k_norm.weight", "(K H) -> K H"),
    "layers.attention_norm.scale": Source(_LAYER + "post_attention_layernorm.weight", "D -> D"),
    "layers.experts_norm.scale": Source(_LAYER + "post_feedforward_layernorm.weight", "D -> D"),
    "norm.scale": Source("model.norm.weight", "D -> D"),
    "head": Source("lm_head.weight", "V D -> D V"),
}
DENSE = {  # OLMo 2: becomes the public expert, alone; its router row stays 0
    "feed_forward.gate": Source(_MLP + "gate_proj.weight", "F D -> D F"),
    "feed_forward.up": Source(_MLP + "up_proj.weight", "F D -> D F"),
    "feed_forward.down": Source(_MLP + "down_proj.weight", "D F -> F D"),
}
ROW = Source(_MLP + "gate.weight", "E D -> E D")
BIAS = Source(_MLP + "gate.bias", "E -> E")  # only where our own PyTorch file computes
ROUTER = {"router.row": ROW}
SEPARATE = {  # FlexOlmo as it is released
    "feed_forward.gate": Source(_MLP + "experts.{e}.gate_proj.weight", "F D -> D F"),
    "feed_forward.up": Source(_MLP + "experts.{e}.up_proj.weight", "F D -> D F"),
    "feed_forward.down": Source(_MLP + "experts.{e}.down_proj.weight", "D F -> F D"),
}
_PACKED = {  # FlexOlmo as transformers 5 holds it in memory
    "feed_forward.gate": Source(_MLP + "experts.gate_up_proj", "E (2 F) D -> 2 E D F", half=0),
    "feed_forward.up": Source(_MLP + "experts.gate_up_proj", "E (2 F) D -> 2 E D F", half=1),
    "feed_forward.down": Source(_MLP + "experts.down_proj", "E D F -> E F D"),
}


_FACTORS = {  # FlexMoRE: theirs are a [R, in] and b [out, R], with b a in place of our a b
    "gate.a": ("gate_proj_a", "R D -> D R"),
    "gate.b": ("gate_proj_b", "F R -> R F"),
    "up.a": ("up_proj_a", "R D -> D R"),
    "up.b": ("up_proj_b", "F R -> R F"),
    "down.a": ("down_proj_a", "R F -> F R"),
    "down.b": ("down_proj_b", "D R -> R D"),
}


class RankGroup(NamedTuple):
    """Experts of one rank.

    Attributes:
      rank: of all their deltas, in all layers.
      experts: their numbers in the directory.
    """

    rank: int
    experts: tuple[int, ...]


def factors(group: RankGroup) -> dict[str, Source]:
    """Where the deltas of low-rank experts are, by their names in a `LowRankFeedForward`."""
    return {
        name: Source(f"{_MLP}experts.{{e}}.{key}.weight", axes, None, group.experts, group.rank)
        for name, (key, axes) in _FACTORS.items()
    }


def rank_groups(ranks: Sequence[int]) -> tuple[tuple[int, ...], list[RankGroup]]:
    """The numbers of the full experts, whose rank is 0; and groups of the others, by rank."""
    of_rank = {
        rank: tuple(e for e, own in enumerate(ranks) if own == rank) for rank in sorted({0, *ranks})
    }
    return of_rank.pop(0), [RankGroup(*each) for each in of_rank.items()]


def experts_table(
    config: ModelConfig, names: Iterable[str], ranks: Sequence[int] = ()
) -> dict[str, Source]:
    """The rows for the experts: dense, or a mixture in one of its layouts.

    Args:
      config: sizes.
      names: of the stored tensors.
      ranks: of a FlexMoRE model, one for each expert.
    """
    experts = [name for name in names if ".mlp.experts." in name]
    if config.num_experts == 1 and not experts:
        return DENSE
    full, groups = rank_groups(ranks)
    if not groups:
        packed = any(name.endswith(".gate_up_proj") for name in experts)
        return {**ROUTER, **(_PACKED if packed else SEPARATE)}
    order = sum((group.experts for group in groups), full)
    table = {"router.row": ROW._replace(experts=order)}
    for name, source in SEPARATE.items():
        matrix = name.removeprefix("feed_forward.")
        table[f"feed_forward.full.{matrix}"] = source._replace(experts=full)
    for number, group in enumerate(groups):
        prefix = f"feed_forward.low_rank.group{number}."
        table |= {prefix + name: source for name, source in factors(group).items()}
    return table


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The letters of `Source.axes`."""
    c = config
    heads = {"N": c.num_heads, "K": c.kv_heads, "H": c.head_size}
    return heads | {"V": c.vocab_size, "D": c.width, "F": c.ffn_width, "E": c.num_experts, "2": 2}
