"""The forms of a merged model that a study tries, and the one that it chooses."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.federation.merge import add_expert, merge
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.studies.baselines import models
from flexolmo_jax.studies.baselines.models import merged, routed
from flexolmo_jax.studies.engine.stages import Stage, discard

CHOICE = "choice.json"  # in the folder of a stage that chooses
CHOSEN = "chosen"  # in the same folder: the merged model in that form
Memory = tuple[float, float] | None
Evidence = tuple[float, float, float] | None


@dataclasses.dataclass(frozen=True)
class Packages:
    """The owners' packages in one form, and the stages that make them."""

    places: Mapping[str, Path]
    needs: tuple[Stage, ...]

    @property
    def paths(self) -> list[Path]:
        """In the order of the owners."""
        return list(self.places.values())


@dataclasses.dataclass(frozen=True)
class Family:
    """A merged model in all forms that are tried, and the stage that chooses one of them.

    Attributes:
      anchor: what the packages stand beside.
      rows: packages by the kind of their router rows.
      choice: leaves CHOICE, with router, memory and active; perhaps with evidence, by which the
        family is routed instead of by rows.
    """

    anchor: Path
    rows: Mapping[str, Packages]
    choice: Stage

    @property
    def needs(self) -> tuple[Stage, ...]:
        """The choice and what it depends on."""
        return (self.choice, *self.choice.needs)

    def read(self) -> dict[str, Any]:
        """The choice: router, memory, active, and perhaps evidence."""
        return json.loads((self.choice.folder / CHOICE).read_text())

    def packages(self) -> Packages:
        """Those with the chosen rows."""
        return self.rows[self.read()["router"]]

    def merged(self, folder: Path) -> Path:
        """Merges the chosen form on disk."""
        return self._merged(self.packages().paths, folder)

    def _merged(self, packages: Sequence[Path], folder: Path) -> Path:
        choice = self.read()
        memory, evidence = as_memory(choice["memory"]), as_evidence(choice.get("evidence"))
        return merged(self.anchor, packages, folder, memory, evidence)

    def as_chosen(self, model: FlexOlmo, **changes: Any) -> FlexOlmo:
        """A model that is routed as was chosen, or with `changes`."""
        return routed_as(model, {**self.read(), **changes})

    def chosen(self, folder: Path, packages: Packages | None = None, **changes: Any) -> FlexOlmo:
        """The chosen form in memory, or the same of other packages."""
        paths = (packages or self.packages()).paths
        return self.as_chosen(load(self._merged(paths, folder)), **changes)

    def without_bias(self, folder: Path) -> FlexOlmo:
        """The chosen form without router biases."""
        return models.without_bias(self.chosen(folder))

    def bias_folded(self, folder: Path) -> FlexOlmo:
        """The chosen form with its biases folded into the rows."""
        return models.bias_folded(self.chosen(folder), self.anchor)

    def grown(self, folder: Path, count: int) -> FlexOlmo:
        """The chosen form of two owners, to which others are added later, one by one."""
        two, later = self.packages().paths[:2], self.packages().paths[2:count]
        model = self._merged(two, folder)
        for package in later:
            add_expert(model, package, allow_share=None)
        return self.as_chosen(load(model))


def as_memory(values: Sequence[float] | None) -> Memory:
    """A memory as the config has it, from JSON."""
    return None if values is None else (values[0], values[1])


def as_evidence(values: Sequence[float] | None) -> Evidence:
    """Decay, strength and shift of evidence routing as the config has them, from JSON."""
    return None if values is None else (values[0], values[1], values[2])


def routed_as(model: FlexOlmo, choice: Mapping[str, Any]) -> FlexOlmo:
    """The model with the memory or evidence, and the number of active experts, of a choice."""
    return routed(
        model, active=choice["active"], memory=as_memory(choice["memory"]),
        evidence=as_evidence(choice.get("evidence")),
    )  # fmt: skip


def write_choice(
    anchor: Path,
    packages: Packages,
    choice: Mapping[str, Any],
    tried: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    """Writes what was chosen of what was tried (CHOICE), and the merged model (CHOSEN).

    Args:
      anchor, packages: of the family, in the chosen form.
      choice: router, memory, active, and perhaps evidence.
      tried: all options with their tuning scores.
      folder: of the stage.
    """
    discard(folder / CHOSEN)  # of an interrupted run
    merge(
        anchor, packages.paths, folder / CHOSEN,
        active_experts=choice["active"], memory=as_memory(choice["memory"]),
        evidence=as_evidence(choice.get("evidence")), allow_share=None,
    )  # fmt: skip
    replace_file(folder / CHOICE, json.dumps({**choice, "tried": tried}, indent=1))


def load_with(path: Path, _: Path, anchor: Path | None = None, **changes: Any) -> FlexOlmo:
    """The model at a path, with changes of its config; the folder of the stage is not used."""
    model = load(path, anchor=anchor)
    return dataclasses.replace(model, config=model.config.replace(**changes))


def load_merged(
    anchor: Path,
    packages: Sequence[Path],
    folder: Path,
    active: int | None = None,
    bias: bool = True,
) -> FlexOlmo:
    """A merged model without memory, as in the paper."""
    model = routed(load(merged(anchor, packages, folder)), active=active)
    return model if bias else models.without_bias(model)
