"""How a merged model routes: chosen when it is merged, kept in its manifest."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from flexolmo_jax.config import EVIDENCE, check_evidence, check_memory
from flexolmo_jax.federation.anchor import LoadedAnchor
from flexolmo_jax.federation.package import Package

EvidenceChoice = tuple[float, float, float] | Literal["auto"] | None
_EVIDENCE = ("decay", "strength", "shift")


class Routing(NamedTuple):
    """The fields of `ModelConfig` of these names."""

    active_experts: int | None = None
    memory: tuple[float, float] | None = None
    evidence: tuple[float, float, float] | None = None

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Routing":
        """Of a merged model's manifest."""
        memory, evidence = manifest.get("memory"), manifest.get("evidence")  # not in older ones
        return cls(
            manifest.get("active_experts"),
            memory and (memory["decay"], memory["weight"]),
            evidence and tuple(evidence[name] for name in _EVIDENCE),
        )

    def described(self) -> str:
        """In words, for people."""
        if self.evidence:
            return "evidence routing " + " ".join(f"{x:g}" for x in self.evidence)
        if self.memory:
            return f"router memory {self.memory[0]:g} {self.memory[1]:g}"
        return "no router memory"

    def fields(self) -> dict[str, Any]:
        """As the manifest has it."""
        memory, evidence = self.memory, self.evidence
        return {
            "active_experts": self.active_experts,
            "memory": memory and dict(zip(("decay", "weight"), memory, strict=True)),
            **({"evidence": dict(zip(_EVIDENCE, evidence, strict=True))} if evidence else {}),
        }


def choose_routing(
    anchor: LoadedAnchor,
    packages: Sequence[Package],
    active_experts: int | None,
    memory: tuple[float, float] | None,
    evidence: EvidenceChoice,
) -> Routing:
    """The routing of a merge; arguments as in `merge`.

    Raises:
      ValueError: a value is out of range; evidence routing is asked for, and somebody has no
        evidence head.
    """
    if active_experts is not None and active_experts < 1:
        raise ValueError(f"active_experts must be at least 1, found {active_experts}")
    if memory is not None:
        check_memory(*memory)
    missing = without_evidence_head(anchor, packages)
    if evidence == "auto":
        evidence = EVIDENCE if packages and not missing else None
    if evidence is None:
        return Routing(active_experts, memory)
    check_evidence(*evidence)
    if missing:
        raise ValueError(
            "evidence routing needs an evidence head of the anchor and of every expert, and there "
            f"is none in {', '.join(missing)}; train with evidence_rank, or merge with "
            "--no-evidence"
        )
    return Routing(active_experts, None, evidence)


def without_evidence_head(anchor: LoadedAnchor, packages: Sequence[Package]) -> list[str]:
    """Who has no evidence head, so that a merge with them routes by rows."""
    missing = [] if anchor.weights.public.ranks.evidence else ["the anchor"]
    return missing + [str(x.folder) for x in packages if not x.weights.ranks.evidence]
