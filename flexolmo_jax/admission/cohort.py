"""The anchor and the experts that were admitted before, which a new package is compared with."""

from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.config import EVIDENCE, MEMORY
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor
from flexolmo_jax.federation.expert import check_made_for
from flexolmo_jax.federation.merged import open_merged
from flexolmo_jax.federation.names import check_distinct
from flexolmo_jax.federation.package import Package, check_packages
from flexolmo_jax.federation.routing import Routing


class Cohort(NamedTuple):
    """What was admitted before, and the anchor.

    Attributes:
      anchor: its weights are left in their files.
      path: of the anchor.
      members: packages of admitted experts.
      routing: of the merged model that they are in; None: as `merge` chooses by default.
    """

    anchor: LoadedAnchor
    path: Path
    members: tuple[Package, ...]
    routing: Routing | None

    @property
    def memory(self) -> tuple[float, float] | None:
        """Of routing by rows: as merged; the default where evidence routes."""
        own = self.routing
        return MEMORY if own is None or own.evidence else own.memory

    @property
    def active_experts(self) -> int | None:
        """How many experts a token may use; None: all."""
        return self.routing and self.routing.active_experts

    @property
    def names(self) -> tuple[str, ...]:
        """Of the admitted experts."""
        return tuple(member.manifest["name"] for member in self.members)

    @property
    def evidence(self) -> tuple[float, float, float]:
        """Decay, strength and shift of routing by evidence heads."""
        return (self.routing and self.routing.evidence) or EVIDENCE


def open_cohort(anchor: str | Path, folders: tuple[str, ...]) -> Cohort:
    """Opens the anchor and the cohort, and checks every byte of them.

    Args:
      anchor: an anchor package or a Hugging Face directory.
      folders: expert packages, or merged models of the same anchor.

    Raises:
      ValueError: one is missing, damaged, or made for another anchor; an expert comes twice, or
        there are two merged models.
    """
    loaded = read_anchor(Path(anchor), on_disk=True)
    members: list[Package] = []
    routings: list[Routing] = []
    for folder in folders:
        package = Package.open(Path(folder))
        kind = package.manifest["kind"]
        if kind == "anchor":
            raise ValueError(
                f"{folder}: an anchor; the cohort is expert packages or a merged model"
            )
        if kind == "merged":
            members += open_merged(package).experts
            routings.append(Routing.of(package.manifest))
        else:
            members.append(package)
    if len(routings) > 1:
        raise ValueError("the cohort has two merged models; name the packages of one of them")
    check_distinct([member.manifest["name"] for member in members])
    for member in members:
        check_made_for(member, loaded)
    check_packages(members)
    return Cohort(loaded, Path(anchor), tuple(members), routings[0] if routings else None)
