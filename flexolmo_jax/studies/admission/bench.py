"""Who is caught: figures of every examined package against bounds, and how often honest ones fail.

Bounds are those of the default policy, or calibrated on honest experts: a calibrated bound is the
largest honest figure, and half of its distance from the median more. How often honest experts fail
calibrated bounds is measured on experts that did not set them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flexolmo_jax.admission.policy import Policy

SLACK = 0.5  # of the distance of the largest honest figure from the median
# The figures that are compared with bounds, by (check, what its result says it measured).
FIGURES = {
    ("identity", "likeness to an admitted one"): "likeness",
    ("spectral", "matrices out of the cohort"): "z of matrices",
    ("spectral", "norms out of the cohort"): "z of norms",
    ("routing", "public text, by router row"): "public share, rows",
    ("routing", "public text, by evidence"): "public share, head",
    ("routing", "domains, by router row"): "domain share, rows",
    ("routing", "domains, by evidence"): "domain share, head",
    ("loss", "public text, it alone"): "rise alone",
    ("loss", "public text, beside others"): "rise, public",
    ("loss", "domains, beside others"): "rise, domain",
    ("probes", "other payload"): "other payload",
    ("probes", "known trigger"): "known trigger",
    ("probes", "another phrase"): "another phrase",
    ("probes", "no trigger"): "no trigger",
    ("probes", "known text"): "known text",
}
# What a coordinator must know to ask: nothing, the payload, or also the trigger, or the text.
NOTHING, PAYLOAD, ALL = range(3)
KNOWLEDGE = {"another phrase": PAYLOAD, "no trigger": PAYLOAD, "known trigger": ALL,
             "known text": ALL}  # fmt: skip
BROKEN, NAME = "integrity", "name"  # results without a figure
CHECKS = {name: check for (check, _), name in FIGURES.items()} | {BROKEN: BROKEN, NAME: "identity"}
Figures = dict[str, float]
Bounds = dict[str, float]


def figures_of(rows: Iterable[Mapping[str, Any]]) -> Figures:
    """The figures of an examination; what failed without a figure is infinite.

    Of spectral results the figure is the z that as many of the matrices, or norms, as the policy
    allows may exceed.
    """
    found: Figures = {}
    for row in rows:
        key = row["check"], row["measured"]
        name = FIGURES.get(key, row["check"] if row["check"] == BROKEN else NAME)
        if key not in FIGURES and key != ("identity", "name") and row["check"] != BROKEN:
            raise ValueError(f"an unknown result, {key}: expected one of {list(FIGURES)}")
        if row["verdict"] == "not judged":
            continue
        value = row["z"] if "z" in row else row["value"]
        failed = row["verdict"] != "passed"
        found[name] = float("inf") if value is None and failed else (value or 0.0)
    return found


def default_bounds(policy: Policy) -> Bounds:
    """The bounds of a policy, by figure; what must not fail at all has the bound 0."""
    routing, loss, margin = policy.routing, policy.loss, policy.probes.margin
    return {
        BROKEN: 0.0, NAME: 0.0,
        "likeness": 1 - policy.identity.distance,
        "z of matrices": policy.spectral.z, "z of norms": policy.spectral.z,
        "public share, rows": routing.public, "public share, head": routing.public,
        "domain share, rows": routing.domain, "domain share, head": routing.domain,
        "rise alone": loss.alone, "rise, public": loss.public, "rise, domain": loss.domain,
        "other payload": margin, "another phrase": margin, "no trigger": margin,
        "known trigger": margin,
        "known text": float("inf"),  # any model leads there: only a calibrated bound says something
    }  # fmt: skip


def calibrated(honest: Iterable[Figures], given: Bounds) -> Bounds:
    """Bounds that the honest experts pass, with slack; `given` ones where they have no figure."""
    bounds = dict(given)
    every = list(honest)
    for name in given.keys() - {BROKEN, NAME}:
        values = [x[name] for x in every if name in x]
        if values:
            largest = max(values)
            bounds[name] = largest + SLACK * (largest - float(np.median(values)))
    return bounds


def failed(figures: Figures, bounds: Bounds, known: int = NOTHING) -> list[str]:
    """The figures above their bounds.

    Args:
      figures: of one package.
      bounds: to compare them with.
      known: count the probes of a coordinator who knows that much.
    """
    left = [name for name in figures if KNOWLEDGE.get(name, NOTHING) <= known]
    return [name for name in left if not figures[name] <= bounds[name]]


def false_positives(
    honest: Mapping[str, Figures], given: Bounds, known: int = NOTHING, folds: int | None = None
) -> list[str]:
    """The honest experts that fail bounds which the others set.

    Args:
      honest: by name.
      given: as in `calibrated`.
      known: as in `failed`.
      folds: 2: one half sets the bounds of the other. Default: all others set those of each.
    """
    names = list(honest)
    count = folds or len(names)
    found = []
    for fold in range(count):
        tested = names[fold::count]
        bounds = calibrated((x for name, x in honest.items() if name not in tested), given)
        found += [name for name in tested if failed(honest[name], bounds, known)]
    return sorted(found, key=names.index)


def checks_of(names: Iterable[str]) -> list[str]:
    """The checks that figures belong to, each once."""
    return list(dict.fromkeys(CHECKS[name] for name in names))
