"""The forms of a merged model that a study tries, and the one that it chooses."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.federation.merge import add_expert
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.studies.baselines import models
from flexolmo_jax.studies.baselines.models import merged, routed
from flexolmo_jax.studies.engine.stages import Stage

CHOICE = "choice.json"  # in the folder of a stage that chooses
Memory = tuple[float, float] | None


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
      choice: leaves CHOICE, with router, memory and active.
    """

    anchor: Path
    rows: Mapping[str, Packages]
    choice: Stage

    @property
    def needs(self) -> tuple[Stage, ...]:
        """The choice and what it depends on."""
        return (self.choice, *self.choice.needs)

    def read(self) -> dict[str, Any]:
        """The choice: router, memory, active."""
        return json.loads((self.choice.folder / CHOICE).read_text())

    def packages(self) -> Packages:
        """Those with the chosen rows."""
        return self.rows[self.read()["router"]]

    def merged(self, folder: Path) -> Path:
        """Merges the chosen form on disk."""
        memory = as_memory(self.read()["memory"])
        return merged(self.anchor, self.packages().paths, folder, memory)

    def as_chosen(self, model: FlexOlmo, **changes: Any) -> FlexOlmo:
        """A model with the chosen memory and number of active experts, or with `changes`."""
        choice = {**self.read(), **changes}
        return routed(model, active=choice["active"], memory=as_memory(choice["memory"]))

    def chosen(self, folder: Path, packages: Packages | None = None, **changes: Any) -> FlexOlmo:
        """The chosen form in memory, or the same of other packages."""
        paths = (packages or self.packages()).paths
        return self.as_chosen(load(merged(self.anchor, paths, folder)), **changes)

    def without_bias(self, folder: Path) -> FlexOlmo:
        """The chosen form without router biases."""
        return models.without_bias(self.chosen(folder))

    def bias_folded(self, folder: Path) -> FlexOlmo:
        """The chosen form with its biases folded into the rows."""
        return models.bias_folded(self.chosen(folder), self.anchor)

    def grown(self, folder: Path, count: int) -> FlexOlmo:
        """The chosen form of two owners, to which others are added later, one by one."""
        two, later = self.packages().paths[:2], self.packages().paths[2:count]
        model = merged(self.anchor, two, folder)
        for package in later:
            add_expert(model, package, allow_share=None)
        return self.as_chosen(load(model))


def as_memory(values: Sequence[float] | None) -> Memory:
    """A memory as the config has it, from JSON."""
    return None if values is None else (values[0], values[1])


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
