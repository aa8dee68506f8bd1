"""The removal audit: does a model without an expert equal the model that never had it?

Three models get the same inputs: the merged model with the expert switched off, a copy from which
the expert was removed on disk, and a new merge of all other experts. If the router was not tuned,
their logits must be equal, bit for bit. Rows that were tuned with the expert present stay tuned
when it is switched off, and may leak something about it: the audit measures how much.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexolmo_jax.audits.scoring import ROWS, padded, scores, tokenizer_of
from flexolmo_jax.audits.statistics import Area
from flexolmo_jax.federation.merge import merge, remove_expert
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.federation.routing import Routing
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.privacy.canaries import Canaries


class Sameness(NamedTuple):
    """How the logits of two models compare on the same inputs."""

    equal: bool  # all logits, bit for bit
    largest: float  # absolute difference of two logits


class Leak(NamedTuple):
    """By how many nats per text one model predicts better than another."""

    texts: int
    better: int  # number of texts predicted better, by any amount
    mean: float
    largest: float

    @classmethod
    def of(cls, gains: np.ndarray) -> "Leak":
        better = int(np.sum(gains > 0))
        return cls(len(gains), better, float(gains.mean()), float(gains.max()))


class Removal(NamedTuple):
    """What remains of a removed expert."""

    tuned: bool  # whether the router's rows were tuned with the expert present
    switched_off: Sameness  # compared with the model that never had it
    removed: Sameness
    members: Leak | None  # of included canaries, switched off compared with never present
    controls: Leak | None  # of held-out canaries
    distinguished: Area | None  # how well these gains distinguish the two groups
    prefixes: Leak | None  # of passages of the owner's text

    @property
    def nothing_is_left(self) -> bool:
        return self.switched_off.equal and self.removed.equal


def audit_removal(
    path: Path, name: str, canaries: Canaries | None, passages: Sequence[Sequence[int]]
) -> Removal:
    """Compares a merged model without an expert with the model that never had it.

    Args:
      path: the merged model.
      name: the expert's.
      canaries: of the expert's run, if any.
      passages: ids of passages of the owner's text; may be empty if there are canaries.

    Raises:
      ValueError: the model has no such expert, or a package is damaged.
    """
    manifest = read_manifest(path, kind="merged")
    paths = {entry["name"]: path / entry["path"] for entry in manifest["experts"]}
    if name not in paths:
        raise ValueError(
            f"{path}: no expert named {name!r}; there are {', '.join(paths) or 'none'}"
        )
    model = load(path)
    others = [package for label, package in paths.items() if label != name]
    never, removed = _without(path, manifest, others, name)
    candidates = canaries.ids(tokenizer_of(model)) if canaries else []
    inputs = [*candidates, *passages]
    off = _same(model, never, inputs, without=[name])
    members = controls = distinguished = prefixes = None
    gains = _nats(never, inputs) - _nats(model, inputs, without=[name])
    if canaries:
        inserted = np.array([canary.inserted for canary in canaries.candidates])
        of_canaries = gains[: len(candidates)]
        groups = of_canaries[inserted], of_canaries[~inserted]
        members, controls = (Leak.of(group) if len(group) else None for group in groups)
        distinguished = Area.of_scores(*groups) if members and controls else None
    if len(passages):
        prefixes = Leak.of(gains[len(candidates) :])
    return Removal(
        "tensors" in manifest, off, _same(removed, never, inputs),
        members, controls, distinguished, prefixes,
    )  # fmt: skip


def _without(
    path: Path, manifest: dict, others: list[Path], name: str
) -> tuple[FlexOlmo, FlexOlmo]:
    """The model that never had the expert, and a copy from which it was removed on disk."""
    beside = path.absolute().parent  # so the relative paths in a copy stay valid
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{path.absolute().name}.") as folder:
        never = Path(folder) / "never"
        anchor = path / manifest["anchor"]["path"]
        separator = manifest["anchor"].get("separator")
        routing = Routing.of(manifest)._asdict()
        merge(anchor, others, never, separator=separator, allow_share=None, **routing)
        never_had = load(never)
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{path.absolute().name}.") as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        remove_expert(folder, name)
        return never_had, load(folder)


def _same(
    model: FlexOlmo, other: FlexOlmo, inputs: list[Sequence[int]], without: Sequence[str] = ()
) -> Sameness:
    equal, largest = True, 0.0
    for first in range(0, len(inputs), ROWS):
        rows = padded(inputs[first : first + ROWS])
        logits = np.asarray(model.logits(rows, without=without))
        others = np.asarray(other.logits(rows))
        equal = equal and np.array_equal(logits, others)
        largest = max(largest, float(np.abs(logits - others).max()))
    return Sameness(equal, largest)


def _nats(model: FlexOlmo, inputs: list[Sequence[int]], without: Sequence[str] = ()) -> np.ndarray:
    return np.array([score.nats for score in scores(model, inputs, without=without)])
