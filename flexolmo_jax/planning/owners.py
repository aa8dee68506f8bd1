"""The owners' experts of a planned model: their ranks, from a config or from packages."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from flexolmo_jax.config import ModelConfig, Training, check_rank
from flexolmo_jax.federation.package import Package
from flexolmo_jax.modeling.experts import Experts, Ranks
from flexolmo_jax.modeling.low_rank import FeedForwardRanks


class Owners(NamedTuple):
    """The experts of a model beside the public one.

    Attributes:
      ranks: of their heads; evidence heads are loaded where they route.
      deltas: of each expert; None of a full one.
    """

    ranks: Ranks
    deltas: tuple[FeedForwardRanks | None, ...]

    @property
    def low_rank(self) -> list[FeedForwardRanks]:
        """The deltas of those that are not full."""
        return [own for own in self.deltas if own is not None]

    def weights(self, model: ModelConfig) -> float:
        """The number of weights of an expert, router rows included: the mean of all."""
        shapes = (
            jax.eval_shape(
                lambda key, own=own: Experts(model, 1, key, self.ranks, own), jax.random.key(0)
            )
            for own in self.deltas
        )
        count = sum(leaf.size for shape in shapes for leaf in jax.tree.leaves(shape))
        return count / max(len(self.deltas), 1)

    def described(self) -> str:
        """In words: "2 full, 1 of rank 16, 1 of ranks 5, 4, 3" (gate, up, down)."""

        def kind(own: FeedForwardRanks | None) -> str:
            if own is None:
                return "full"
            return (
                f"of rank {own.gate}" if len(set(own)) == 1 else "of ranks {}, {}, {}".format(*own)
            )

        counts = collections.Counter(map(kind, self.deltas))
        return ", ".join(f"{count} {words}" for words, count in counts.items())


def ranks_of(config: Training) -> Ranks:
    """The ranks of the heads that a config trains; none for router rows."""
    return Ranks(*(getattr(config, f"{name}_rank", 0) for name in Ranks._fields))


def trained(config: Training) -> Owners:
    """The expert that a config trains; none of another stage's, but its heads."""
    rank = getattr(config, "ffn_rank", None)
    deltas = FeedForwardRanks(rank, rank, rank) if rank else None
    return Owners(ranks_of(config), () if rank is None else (deltas,))


def equal_owners(config: Training, model: ModelConfig, rank: int | None = None) -> Owners:
    """As many experts as the model has, all as the config trains them.

    Args:
      config: of an expert, or of another stage: then experts are full, without heads.
      model: the merged model.
      rank: of their deltas, 0 for full experts; None: as the config says.

    Raises:
      ValueError: the model is routed by evidence, and the config has no rank of evidence heads; or
        no matrix has this rank.
    """
    ranks = ranks_of(config)
    if model.evidence is None:
        ranks = ranks._replace(evidence=0)
    elif not ranks.evidence:
        raise ValueError(
            "the model is routed by evidence: expected a config of an expert with evidence_rank, "
            f"found {type(config).__name__} with none"
        )
    rank = getattr(config, "ffn_rank", 0) if rank is None else rank
    check_rank("rank", rank, model)
    deltas = FeedForwardRanks(rank, rank, rank) if rank else None
    return Owners(ranks, (deltas,) * (model.num_experts - 1))


def owners_of_packages(packages: Sequence[Path], model: ModelConfig) -> Owners:
    """The experts of packages, of which only manifests are read.

    Raises:
      ValueError: a package is missing, unfit, or made for a model of other sizes.
    """
    opened = [Package.open(path, "expert") for path in packages]
    ours = model.architecture()
    for package in opened:
        theirs = package.config.architecture()
        for name, value in ours.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{package.folder}: made for another model than the config's: expected "
                    f"{name}={value}, found {theirs[name]}"
                )
    ranks = Ranks(*map(max, zip(*(package.weights.ranks for package in opened), strict=True)))
    if model.evidence is None:
        ranks = ranks._replace(evidence=0)
    return Owners(ranks, tuple(package.weights.deltas for package in opened))
