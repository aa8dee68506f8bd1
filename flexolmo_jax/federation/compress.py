"""Compression: an expert package whose feed-forward part is a low-rank delta of the public one.

It merges, loads and is switched off as any other package. What is left out is measured here; what
that costs in bits per byte is for `flexolmo evaluate`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flexolmo_jax.federation.anchor import LoadedAnchor, open_anchor
from flexolmo_jax.federation.expert import check_made_for
from flexolmo_jax.federation.loading import anchor_path
from flexolmo_jax.federation.package import Package, check_packages, write_package
from flexolmo_jax.federation.source import open_source
from flexolmo_jax.modeling.experts import Experts, with_full_feed_forward, with_parts
from flexolmo_jax.modeling.low_rank import FeedForwardRanks, LowRankFeedForward, truncated_svd
from flexolmo_jax.storage.outputs import check_new_folder
from flexolmo_jax.storage.tensors import bytes_of, named, refill

REPLACED = ("format", "made_by", "tensors", "files", "digest")


class Compressed(NamedTuple):
    """What compressing did.

    Attributes:
      ranks: {"gate", "up", "down": the rank of each layer}.
      energy: {name: the share of the delta's squared Frobenius norm that is kept, in each layer}.
      bytes_before, bytes_after: of the tensors of the two packages.
    """

    ranks: dict[str, list[int]]
    energy: dict[str, list[float]]
    bytes_before: int
    bytes_after: int


def compress(
    package: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    anchor: Path | None = None,
) -> Compressed:
    """Writes an expert package again, with a low-rank feed-forward part; nothing is trained.

    The deltas of the three matrices to the public expert's become products a b by a truncated SVD
    of each. All other parts stay as they are, and so does the manifest, a privacy certificate
    included: a function of the released weights reveals nothing more of the text.

    Args:
      package: a full or a low-rank expert.
      out: the new package; must not exist.
      rank: of every matrix of every layer; give this or `energy`.
      energy: each matrix gets the smallest rank that keeps this share of its delta's squared
        Frobenius norm, in (0, 1]. In the package, the layers of a matrix have columns of the
        largest of their ranks.
      anchor: the anchor that it was made for; default: near it (`anchor_path`).

    Raises:
      ValueError: a number is out of range, a package is damaged or made for another anchor, or
        `out` cannot be written; nothing is written.
    """
    check_new_folder(out, [package, *([] if anchor is None else [anchor])])
    opened = Package.open(package, "expert")
    _check_choice(rank, energy, opened)
    place = anchor_path(opened) if anchor is None else anchor
    loaded = open_anchor(open_source(place, "anchor"), opened.manifest.get("separator"))
    check_made_for(opened, loaded)
    check_packages([*loaded.packages, opened])
    factors = {
        name: list(matrices) for name, matrices in _factors(opened.weights, loaded, rank, energy)
    }
    ranks = {name: [len(x.b) for x in layers] for name, layers in factors.items()}
    compressed = with_parts(opened.weights, feed_forward=_padded(factors, ranks, loaded))
    manifest = {k: v for k, v in opened.manifest.items() if k not in REPLACED}
    chosen = {"rank": rank} if rank is not None else {"energy": energy}
    manifest["compressed"] = {"from": opened.digest, **chosen}
    write_package(out, manifest, compressed)
    return Compressed(
        ranks,
        {name: [x.energy for x in layers] for name, layers in factors.items()},
        bytes_of(opened.weights),
        bytes_of(compressed),
    )


def _check_choice(rank: int | None, energy: float | None, package: Package) -> None:
    if (rank is None) == (energy is None):
        raise ValueError("give a rank or an energy, and not both")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], found {energy}")
    largest = min(package.config.width, package.config.ffn_width)
    if rank is not None and not 1 <= rank <= largest:
        raise ValueError(
            f"rank must be from 1 to {largest}, the smaller side of a matrix of {package.folder}, "
            f"found {rank}"
        )


class _Factors(NamedTuple):
    a: np.ndarray  # [I, R]
    b: np.ndarray  # [R, O]
    energy: float


def _factors(
    expert: Experts, anchor: LoadedAnchor, rank: int | None, energy: float | None
) -> Iterator[tuple[str, Iterator[_Factors]]]:
    """For each matrix its factors, layer by layer; a layer is read when it is asked for."""
    public = anchor.weights.public
    full = named(with_full_feed_forward(expert, public).feed_forward)
    base = named(public.feed_forward)

    def of_layers(name: str) -> Iterator[_Factors]:
        for layer in range(anchor.config.num_layers):
            part = (slice(layer, layer + 1), slice(None), slice(None), slice(None))
            own, shared = (np.asarray(x[name][part], np.float64)[0, 0] for x in (full, base))
            yield _Factors(*truncated_svd(own - shared, rank, energy))

    for name in FeedForwardRanks._fields:
        yield name, of_layers(name)


def _padded(
    factors: dict[str, list[_Factors]], ranks: dict[str, list[int]], anchor: LoadedAnchor
) -> LowRankFeedForward:
    """The factors of all layers in stacks [L, 1, ...], with zero columns up to the largest rank."""
    config, largest = anchor.config, FeedForwardRanks(*(max(x) for x in ranks.values()))
    sizes = config.num_layers, 1, config.width, config.ffn_width, largest
    shapes = jax.eval_shape(lambda key: LowRankFeedForward(*sizes, key), jax.random.key(0))
    stacks: dict[str, Any] = {}
    for name, layers in factors.items():
        for side in ("a", "b"):
            stack = np.zeros(named(shapes)[f"{name}.{side}"].shape, np.float32)
            for layer, own in enumerate(layers):
                matrix = getattr(own, side)
                stack[layer, 0, : matrix.shape[0], : matrix.shape[1]] = matrix
            stacks[f"{name}.{side}"] = stack
    return refill(shapes, stacks)
