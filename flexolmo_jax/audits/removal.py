"""The removal audit: is a model without an expert the model that never had it?

Three models answer the same questions: the merged model with the expert switched off, a copy that
it was taken out of on disk, and one merged anew from all the others. Where the router was not
tuned, their logits must be equal, bit for bit. Rows that were tuned while the expert was there stay
tuned when it is switched off, and may say something of it: that is measured.
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
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.privacy.canaries import Canaries


class Sameness(NamedTuple):
    """How two models answer the same questions."""

    equal: bool  # all logits, bit for bit
    largest: float  # difference of two logits


class Leak(NamedTuple):
    """How much better one model predicts than another, in nats of a whole text."""

    texts: int
    better: int  # texts that are predicted better, by any amount
    mean: float
    largest: float

    @classmethod
    def of(cls, gains: np.ndarray) -> "Leak":
        better = int(np.sum(gains > 0))
        return cls(len(gains), better, float(gains.mean()), float(gains.max()))


class Removal(NamedTuple):
    """What is left of an expert."""

    tuned: bool  # whether the router's rows were tuned with the expert present
    switched_off: Sameness  # against the model that never had it
    removed: Sameness
    members: Leak | None  # switched off, against never: canaries that were put in
    controls: Leak | None  # and those left out
    told_apart: Area | None  # by these gains
    prefixes: Leak | None  # continuations of prefixes of the owner's text

    @property
    def nothing_is_left(self) -> bool:
        return self.switched_off.equal and self.removed.equal


def audit_removal(
    path: Path, name: str, canaries: Canaries | None, passages: Sequence[Sequence[int]]
) -> Removal:
    """Asks a merged model without an expert, and one that never had it, the same questions.

    Args:
      path: the merged model.
      name: of the expert.
      canaries: of the expert's run, if any.
      passages: ids of passages of the owner's text; may be none, where there are canaries.

    Raises:
      ValueError: there is no such expert in it; a part is damaged.
    """
    manifest = read_manifest(path, kind="merged")
    there = {entry["name"]: path / entry["path"] for entry in manifest["experts"]}
    if name not in there:
        raise ValueError(
            f"{path}: no expert named {name!r}; there are {', '.join(there) or 'none'}"
        )
    model = load(path)
    never, removed = _without(path, manifest, [p for one, p in there.items() if one != name], name)
    candidates = canaries.ids(tokenizer_of(model)) if canaries else []
    questions = [*candidates, *passages]
    off = _same(model, never, questions, without=[name])
    members = controls = told_apart = prefixes = None
    gains = _nats(never, questions) - _nats(model, questions, without=[name])
    if canaries:
        inserted = np.array([one.inserted for one in canaries.candidates])
        of_canaries = gains[: len(candidates)]
        groups = of_canaries[inserted], of_canaries[~inserted]
        members, controls = (Leak.of(group) if len(group) else None for group in groups)
        told_apart = Area.of_scores(*groups) if members and controls else None
    if len(passages):
        prefixes = Leak.of(gains[len(candidates) :])
    return Removal(
        "tensors" in manifest, off, _same(removed, never, questions),
        members, controls, told_apart, prefixes,
    )  # fmt: skip


def _without(
    path: Path, manifest: dict, others: list[Path], name: str
) -> tuple[FlexOlmo, FlexOlmo]:
    """The model that never had the expert, and one that it was taken out of on disk."""
    beside = path.absolute().parent  # so that the paths in a copy hold
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{path.absolute().name}.") as folder:
        never = Path(folder) / "never"
        anchor = path / manifest["anchor"]["path"]
        active = manifest["active_experts"]
        separator = manifest["anchor"].get("separator")
        kept = manifest.get("memory")
        merge(
            anchor, others, never, active_experts=active, separator=separator, allow_share=None,
            memory=kept and (kept["decay"], kept["weight"]),
        )  # fmt: skip
        found = load(never)
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{path.absolute().name}.") as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        remove_expert(folder, name)
        return found, load(folder)


def _same(
    one: FlexOlmo, other: FlexOlmo, questions: list[Sequence[int]], without: Sequence[str] = ()
) -> Sameness:
    equal, largest = True, 0.0
    for first in range(0, len(questions), ROWS):
        rows = padded(questions[first : first + ROWS])
        here, there = np.asarray(one.logits(rows, without=without)), np.asarray(other.logits(rows))
        equal = equal and np.array_equal(here, there)
        largest = max(largest, float(np.abs(here - there).max()))
    return Sameness(equal, largest)


def _nats(
    model: FlexOlmo, questions: list[Sequence[int]], without: Sequence[str] = ()
) -> np.ndarray:
    return np.array([one.nats for one in scores(model, questions, without=without)])
