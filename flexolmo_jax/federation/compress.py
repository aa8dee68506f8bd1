"""Compression: an expert package in low-rank deltas of the public expert, in integers, or in both.

It merges, loads and is switched off as any other package. What is left out is measured here; what
that costs in bits per byte, the command shows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flexolmo_jax.federation.anchor import LoadedAnchor, open_anchor
from flexolmo_jax.federation.expert import check_made_for
from flexolmo_jax.federation.integers import Rounding, round_matrices
from flexolmo_jax.federation.loading import anchor_path
from flexolmo_jax.federation.package import Package, check_packages, write_package
from flexolmo_jax.federation.source import open_source
from flexolmo_jax.modeling.experts import Experts, FeedForward, with_full_feed_forward, with_parts
from flexolmo_jax.modeling.low_rank import FeedForwardRanks, LowRankFeedForward, truncated_svd
from flexolmo_jax.storage.outputs import check_new_folder
from flexolmo_jax.storage.tensors import bytes_of, named, refill

REPLACED = ("format", "made_by", "tensors", "files", "digest")


class Compressed(NamedTuple):
    """What compressing did.

    Attributes:
      ranks: {"gate", "up", "down": the rank of each layer}; empty if the ranks are as they were.
      energy: {name: the share of the delta's squared Frobenius norm that is kept, in each layer}.
      rounding: {name of a tensor: norm of the error of rounding over that of the matrix}; empty if
        nothing was rounded.
      bytes_before, bytes_after: of the tensors of the two packages.
    """

    ranks: dict[str, list[int]]
    energy: dict[str, list[float]]
    rounding: dict[str, float]
    bytes_before: int
    bytes_after: int


def compress(
    package: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    bits: int | None = None,
    group: int | None = None,
    anchor: Path | None = None,
) -> Compressed:
    """Writes an expert package again, smaller; nothing is trained.

    With `rank` or `energy`, the deltas of the three feed-forward matrices to the public expert's
    become products a b by a truncated SVD of each. With `bits`, all matrices of all parts, factors
    included, become integers with scales; they are read back as float32. All other tensors stay as
    they are, and so does the manifest, a privacy certificate included: a function of the released
    weights reveals nothing more of the text.

    Args:
      package: a full or a low-rank expert.
      out: the new package; must not exist.
      rank: of every matrix of every layer; not with `energy`.
      energy: each matrix gets the smallest rank that keeps this share of its delta's squared
        Frobenius norm, in (0, 1]. In the package, the layers of a matrix have columns of the
        largest of their ranks.
      bits: 8, with a scale for each output channel, or 4, with one for each group of rows of it.
      group: with 4 bits; default: `integers.GROUP`.
      anchor: the anchor that it was made for; default: near it (`anchor_path`).

    Raises:
      ValueError: a number is out of range, a package is damaged or made for another anchor, or
        `out` cannot be written; nothing is written.
    """
    check_new_folder(out, [package, *([] if anchor is None else [anchor])])
    opened = Package.open(package, "expert")
    rounding = _check_choice(rank, energy, bits, group, opened)
    place = anchor_path(opened) if anchor is None else anchor
    loaded = open_anchor(open_source(place, "anchor"), opened.manifest.get("separator"))
    check_made_for(opened, loaded)
    check_packages([*loaded.packages, opened])
    chosen = {"rank": rank, "energy": energy, **(rounding.fields() if rounding else {})}
    manifest = {k: v for k, v in opened.manifest.items() if k not in REPLACED}
    manifest["compressed"] = {"from": opened.digest}
    manifest["compressed"] |= {name: value for name, value in chosen.items() if value is not None}
    factors, compressed = _low_rank(opened.weights, loaded, rank, energy)
    errors: dict[str, float] = {}
    if rounding is not None:
        compressed, errors = round_matrices(compressed, rounding)
    write_package(out, manifest, compressed)
    return Compressed(
        {name: [len(x.b) for x in layers] for name, layers in factors.items()},
        {name: [x.energy for x in layers] for name, layers in factors.items()},
        errors,
        bytes_of(opened.weights),
        bytes_of(compressed),
    )


def _check_choice(
    rank: int | None, energy: float | None, bits: int | None, group: int | None, package: Package
) -> Rounding | None:
    if rank is not None and energy is not None:
        raise ValueError("give a rank or an energy, and not both")
    if rank is None and energy is None and bits is None:
        raise ValueError("give a rank, an energy, or bits: nothing says what to make smaller")
    if bits is None and group is not None:
        raise ValueError("a group is for bits=4; leave it out")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], found {energy}")
    own = package.weights.feed_forward
    is_narrow = isinstance(own, FeedForward) and own.gate.shape[-1] < package.config.ffn_width
    if is_narrow and (rank is not None or energy is not None):
        raise ValueError(
            f"{package.folder}: has fewer hidden units than the public expert, so there is no "
            "delta to it; choose bits alone, or a rank of the expert that it was made of"
        )
    largest = min(package.config.width, package.config.ffn_width)
    if rank is not None and not 1 <= rank <= largest:
        raise ValueError(
            f"rank must be from 1 to {largest}, the smaller side of a matrix of {package.folder}, "
            f"found {rank}"
        )
    return None if bits is None else Rounding.of(bits, group)


def _low_rank(
    expert: Experts, anchor: LoadedAnchor, rank: int | None, energy: float | None
) -> tuple[dict[str, list["_Factors"]], Experts]:
    """The factors of each matrix, and the expert made of them; the expert itself without a size."""
    if rank is None and energy is None:
        return {}, expert
    factors = {name: list(layers) for name, layers in _factors(expert, anchor, rank, energy)}
    ranks = {name: [len(x.b) for x in layers] for name, layers in factors.items()}
    return factors, with_parts(expert, feed_forward=_padded(factors, ranks, anchor))


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
