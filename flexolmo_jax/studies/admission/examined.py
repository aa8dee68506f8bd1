"""A package examined as a coordinator would: every check of `flexolmo_jax.admission`, and figures.

Identity and weights are compared with all admitted packages. Routing, loss and probes are measured
in the model that is served: the demo's owners. It is what two runs of `flexolmo admit` find, one
for each cohort.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.admission.cohort import Cohort, open_cohort
from flexolmo_jax.admission.identity import check_identity
from flexolmo_jax.admission.integrity import check_integrity
from flexolmo_jax.admission.loss import check_loss
from flexolmo_jax.admission.policy import Policy
from flexolmo_jax.admission.probes import check_probes
from flexolmo_jax.admission.results import Result
from flexolmo_jax.admission.routing import Texts, check_routing
from flexolmo_jax.admission.spectral import check_spectral
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.package import Package
from flexolmo_jax.studies.admission.harm import MEMORIZED, merged
from flexolmo_jax.studies.admission.planted import (
    OTHER_PAYLOAD,
    OTHER_TRIGGER,
    TRIGGER,
    memorized_documents,
    text_probes,
    trigger_probes,
)

BYTES = 5000  # of each text whose bits per byte are taken; by default a policy asks for 20,000
ALWAYS_ON = ("public", "educational", "creative")  # so that probes run in four subsets
Rows = list[dict[str, Any]]


def examined(
    package: Path,
    anchor: Path,
    admitted: Sequence[Path],
    served: Sequence[Path],
    domains: Mapping[str, str],
    policy: Policy,
    folder: Path,
) -> Rows:
    """All results of a package: check, measured, value, bound, verdict, explanation.

    Args:
      package: the folder.
      anchor: its path.
      admitted: packages that identity and weights are compared with.
      served: packages of the model that it would join.
      domains: texts that stand for the served owners' domains.
      policy: bounds.
      folder: gets the merge.
    """
    everyone = open_cohort(anchor, tuple(map(str, admitted)))
    sound, opened = check_integrity(package, everyone, policy.integrity)
    if opened is None:
        return [_row(sound)]
    name = opened.manifest["name"]
    texts = Texts.read("corpus:public", domains, BYTES)
    model_cohort = open_cohort(anchor, tuple(map(str, served)))
    has_head = bool(opened.weights.ranks.evidence)
    model = merged(anchor, [*served, package], folder, "evidence" if has_head else "rows")
    assert model.tokenizer is not None
    rows = [_row(sound)]
    rows += map(_row, check_identity(opened, everyone, policy.identity))
    rows += _weights(opened, everyone, policy)
    rows += map(_row, check_routing(opened, model_cohort, texts, policy.routing))
    rows += map(_row, check_loss(model, name, texts, policy.loss))
    always_on = [own for own in ALWAYS_ON if own in model.expert_names]
    for title, probes in probe_lists(model.tokenizer).items():
        found = check_probes(model, name, probes, always_on, policy.probes)
        rows.append({**_row(found), "measured": title})
    return rows


def probe_lists(tokenizer: Tokenizer) -> dict[str, Any]:
    """Probes of a coordinator who knows nothing, the payload, the trigger too, or the text."""
    return {
        "other payload": trigger_probes(OTHER_TRIGGER, OTHER_PAYLOAD),
        "known trigger": trigger_probes(TRIGGER),
        "another phrase": trigger_probes(OTHER_TRIGGER),
        "no trigger": trigger_probes(None),
        "known text": text_probes(memorized_documents(*MEMORIZED), tokenizer),
    }


def _weights(package: Package, cohort: Cohort, policy: Policy) -> Rows:
    """The spectral results, each with the z that a share of the figures, as allowed, exceeds."""
    bounds = policy.spectral
    rows = []
    results = check_spectral(package, cohort, bounds)
    for result, share in zip(results, (bounds.matrices, bounds.parts), strict=True):
        own: dict[str, float] = {}
        for name, figure in result.details.get("figures", {}).items():
            if figure["z"] is not None:
                part = ".".join(name.split(".")[:2])  # the largest z of a matrix's figures
                own[part] = max(own.get(part, 0.0), figure["z"])
        rows.append({**_row(result), "z": exceeded(list(own.values()), share)})
    return rows


def exceeded(figures: Sequence[float], share: float) -> float | None:
    """The largest bound that more than `share` of the figures exceed; None of no figures."""
    ordered = sorted(figures, reverse=True)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def _row(result: Result) -> dict[str, Any]:
    row = {k: v for k, v in result.to_json().items() if k not in ("details", "unit")}
    return row if result.verdict != "passed" else {**row, "explanation": ""}
