"""The stages of a study for experts with heads: routed by evidence, and by rows."""

from functools import partial
from pathlib import Path
from typing import Any

from flexolmo_jax.config import EVIDENCE
from flexolmo_jax.model import load
from flexolmo_jax.studies.baselines.families import Family, Packages, load_with, write_choice
from flexolmo_jax.studies.baselines.models import merged
from flexolmo_jax.studies.baselines.score_stages import (
    NEAR,
    Scoring,
    active_experts,
    best_option,
    choose_family,
)
from flexolmo_jax.studies.baselines.training_stages import headed_btx, package, packages_of


def add_headed(scoring: Scoring) -> dict[str, Family]:
    """Adds the choices and scores of experts with heads.

    Returns:
      by name: the family that is routed by evidence, the same experts routed by rows, and BTX with
      heads, routed by evidence.
    """
    anchor, headed = scoring.models.anchor_path, packages_of(scoring.models.headed)
    router = scoring.seed.config.expert.router
    score_alone(scoring)
    by_evidence = choose_evidence(scoring, "evidence", anchor, router, headed)
    by_rows = choose_family(scoring, "headed_rows", anchor, {router: headed})
    scoring.add("headed_rows", by_rows.needs, by_rows.chosen)
    score_evidence(scoring, by_evidence)
    btx_anchor, packages = headed_btx(scoring.seed, scoring.models)
    btx = choose_evidence(scoring, "btx_evidence", btx_anchor, router, packages)
    scoring.add("btx_evidence", btx.needs, btx.chosen)
    return {"evidence": by_evidence, "headed_rows": by_rows, "btx_evidence": btx}


def score_alone(scoring: Scoring) -> None:
    """Adds the scores of each owner's expert answering alone, on all text: they can be mixed."""
    for name, stage in scoring.models.headed.items():
        model = partial(load_with, package(stage), anchor=scoring.models.anchor_path)
        both = ("tune", "heldout")
        scoring.add(f"headed_alone.{name}", [stage], model, without=("public",), splits=both)


def choose_evidence(
    scoring: Scoring, name: str, anchor: Path, router: str, packages: Packages
) -> Family:
    """Adds the choice of decay, then strength, number of active experts, and shift.

    Args:
      scoring: of the seed.
      name: of the family.
      anchor: what the packages stand beside.
      router: the kind of their rows, which are not used.
      packages: of experts with heads.
    """
    config = scoring.seed.config
    decays, strengths = config.evidence_decays, config.evidence_strengths
    shifts, actives = config.evidence_shifts, scoring.actives

    def work(folder: Path) -> None:
        tried: list[dict[str, Any]] = []
        loaded = {router: load(merged(anchor, packages.paths, folder, evidence=EVIDENCE))}

        best = partial(best_option, scoring, loaded, tried)

        start = {"router": router, "memory": None, "active": None}
        _, strength, shift = EVIDENCE
        choice = best([{**start, "evidence": [d, strength, shift]} for d in decays])
        decay = choice["evidence"][0]
        choice = best([{**start, "evidence": [decay, s, shift]} for s in strengths])
        strength = choice["evidence"][1]
        choice = best([{**choice, "active": k} for k in (None, *actives)], active_experts)
        # The largest shift leaves public text to the public expert; the score counts it little.
        choice = best(
            [{**choice, "evidence": [decay, strength, s]} for s in shifts],
            lambda option: -option["evidence"][2],
        )
        write_choice(anchor, packages, choice, tried, folder)

    needs = (scoring.seed.shared.sequences, *packages.needs)
    stage = scoring.seed.add(
        f"choice/{name}", needs, work,
        decays=decays, strengths=strengths, shifts=shifts, active=actives, near=NEAR,
    )  # fmt: skip
    return Family(anchor, {router: packages}, stage)


def score_evidence(scoring: Scoring, family: Family) -> None:
    """Adds the scores of evidence routing: top-k, pairs, switched off, and growing by owners."""
    for k in (*scoring.actives, None):
        model = partial(family.chosen, active=k)
        scoring.add(f"evidence_top{k or 'all'}", family.needs, model, active=k)
    owners, (packages,) = scoring.seed.config.owners, family.rows.values()
    for name in owners:
        pair = Packages({name: packages.places[name]}, packages.needs)
        domains = ("public", name)
        scoring.add(
            f"headed.{name}", family.needs, partial(family.chosen, packages=pair), domains=domains
        )
        scoring.add(f"evidence_without.{name}", family.needs, family.chosen, without=(name,))
    for count in range(2, len(owners)):
        model = partial(family.grown, count=count)
        scoring.add(f"evidence_owners.{count}", family.needs, model, owners=owners[:count])
