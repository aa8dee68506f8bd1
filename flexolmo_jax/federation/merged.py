"""Merged models: opened, and checked as a whole."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.federation.anchor import LoadedAnchor, open_anchor
from flexolmo_jax.federation.expert import check_made_for
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.federation.package import Package, check_packages, check_shapes
from flexolmo_jax.federation.routing import Routing, choose_routing
from flexolmo_jax.federation.shares import Shares, measure_shares
from flexolmo_jax.federation.source import Require, open_required, open_source
from flexolmo_jax.modeling.experts import Experts, with_parts, with_same_parts
from flexolmo_jax.modeling.router import Router
from flexolmo_jax.storage.tensors import refill


class OpenedModel(NamedTuple):
    """An anchor and experts of which all is checked but the bytes of files (`check_packages`).

    Attributes:
      anchor: its weights in their files, if it is a package.
      experts: their packages: full ones, then low-rank ones by their ranks, since in memory each
        kind is a stack of its own; else in the order of the manifest.
      merged: the merged model's own package; None for an anchor alone or with one expert, which
        nobody merged.
    """

    anchor: LoadedAnchor
    experts: list[Package]
    merged: Package | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the merged model; empty without one."""
        return {} if self.merged is None else self.merged.manifest

    @property
    def names(self) -> tuple[str, ...]:
        return (PUBLIC, *(expert.manifest["name"] for expert in self.experts))

    @property
    def config(self) -> ModelConfig:
        return self.anchor.config.replace(
            num_experts=len(self.names),
            **self.routing._asdict(),
        )

    @property
    def routing(self) -> Routing:
        """As it was merged; of an expert beside its anchor, by evidence if both have heads."""
        if self.merged is not None:
            return Routing.of(self.merged.manifest)
        return choose_routing(self.anchor, self.experts, None, None, "auto")

    @property
    def own_stacks(self) -> list[Experts]:
        """The public expert and the owners', each a stack of one, in order, with its own parts."""
        return [self.anchor.weights.public, *(expert.weights for expert in self.experts)]

    @property
    def packages(self) -> list[Package]:
        own = [] if self.merged is None else [self.merged]
        return [*own, *self.anchor.packages, *self.experts]

    def stacks(self, keep_low_rank: bool = False) -> list[Experts]:
        """The public expert and the owners', each a stack of one, in order, with the same parts.

        Low-rank feed-forward networks become full ones, unless they are kept (`with_same_parts`).
        """
        own = self.own_stacks
        if self.routing.evidence is None:
            own = [with_parts(stack, evidence=None) for stack in own]
        return with_same_parts(own, keep_low_rank)

    @property
    def routers(self) -> list[Router]:
        """Rows and biases that make the router, end to end: the owners' own, or a tuned one."""
        if self.merged is not None and self.merged.weights:
            return [refill(Router(0, 0, 0), self.merged.weights)]
        return [stack.router for stack in self.own_stacks]


def open_merged(
    package: Package, separator: str | None = None, require: Require | None = None
) -> OpenedModel:
    """Opens the anchor and the packages of a merged model; reads no weights of packages.

    Args:
      package: of the merged model.
      separator: the token that opens documents; default: what was named when it was merged.
      require: what the anchor and the experts must be (`federation.source`).

    Raises:
      ValueError: a part is missing, unfit, refused, or not the one that was merged.
    """
    model, pinned = package.folder, package.manifest["anchor"]
    source = open_source(model / pinned["path"], "anchor", require)
    anchor = open_anchor(source, separator or pinned.get("separator"))
    _check_pin(source.folder, anchor, pinned)
    experts = [open_part(model, entry, require) for entry in package.manifest["experts"]]
    for expert in experts:
        check_made_for(expert, anchor)
    experts.sort(key=lambda expert: expert.weights.deltas or ())
    if package.weights:
        sizes = anchor.config.num_layers, len(experts) + 1, anchor.config.width
        check_shapes(model, jax.eval_shape(lambda: Router(*sizes)), package.weights)
    return OpenedModel(anchor, experts, package)


def check_package(path: Path, require: Require | None = None) -> OpenedModel | Package:
    """Checks every byte of a package of any kind; of a merged model, of all its parts too.

    Args:
      path: its folder.
      require: what the package, and each part of a merged model, must be (`federation.source`).

    Returns:
      the opened model if it is a merged one, else the opened package.

    Raises:
      ValueError: a part is missing, damaged, unfit, refused, or not the one that was merged.
    """
    package = open_required(path, None, require)
    if package.manifest["kind"] == "merged":
        opened = open_merged(package, require=require)
        check_packages(opened.packages)
        return opened
    packages = open_anchor(package).packages if package.manifest["kind"] == "anchor" else [package]
    check_packages(packages)
    return package


def shares_of(opened: OpenedModel) -> Shares | None:
    """The share of public text that each expert of a merged model takes, as `merge` returns it."""
    if not opened.experts:
        return None
    return measure_shares(
        opened.anchor, opened.stacks(), opened.names, opened.config, opened.routers
    )


def open_part(model: Path, entry: dict[str, str], require: Require | None = None) -> Package:
    """The package of an entry of a merged model, if it is the one that was merged.

    Raises:
      ValueError: it is missing, unfit, refused, or another package.
    """
    package = open_required(model / entry["path"], "expert", require)
    found = package.manifest["name"]
    if package.digest != entry["digest"] or found != entry["name"]:
        what = "its manifest differs" if found == entry["name"] else f"its name is {found!r}"
        raise ValueError(
            f"{package.folder}: not the package that was merged as {entry['name']!r} ({what}); "
            "remove it with `flexolmo experts remove` and add it again"
        )
    return package


def _check_pin(folder: Path, anchor: LoadedAnchor, pinned: dict[str, Any]) -> None:
    """That an anchor is the one that was merged, its public text and separator included."""
    if anchor.identity != pinned["identity"]:
        raise ValueError(
            f"{folder}: not the anchor that was merged: expected "
            f"{pinned['identity'][:12]}..., found {anchor.identity[:12]}..."
        )
    expected = pinned.get("digest")  # not in the manifests of older versions
    found = anchor.package and anchor.package.digest
    if expected is not None and found != expected:
        raise ValueError(
            f"{folder}: not the anchor that was merged: it has the same weights, and another "
            f"manifest (expected {expected[:12]}..., found {str(found)[:12]}...)"
        )
