"""The stages of a study for one seed: every model that is trained, chosen and scored, in order."""

import dataclasses

from flexolmo_jax.studies.baselines import score_stages as stages
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.shared_stages import Shared
from flexolmo_jax.studies.baselines.training_stages import Seed, plan_trainings
from flexolmo_jax.studies.engine.stages import Stage


@dataclasses.dataclass(frozen=True)
class SeedPlan:
    """The stages of one seed, in order; `scored` are those that hold a model's scores, by name."""

    stages: list[Stage]
    scored: dict[str, Stage]
    choices: dict[str, Stage]
    routing: Stage


def plan_seed(config: StudyConfig, shared: Shared, seed: int) -> SeedPlan:
    """The stages of one seed; nothing is run."""
    of_seed = Seed(config, shared, seed)
    models = plan_trainings(of_seed)
    scoring = stages.Scoring(of_seed, models)
    stages.score_anchor(scoring)
    stages.score_owners(scoring)
    soup = stages.score_soups(scoring)
    ours = stages.choose_family(scoring, "flexolmo", models.anchor_path, models.rows)
    btx = stages.choose_family(scoring, "btx", models.btx_anchor, models.btx_rows)
    stages.score_btx(scoring, btx)
    stages.score_paper(scoring)
    stages.score_ours(scoring, ours)
    stages.score_tuned(scoring, ours)
    stages.score_unrestricted(scoring)
    stages.score_removal(scoring, ours)
    routing = stages.routing_stage(scoring, ours)
    choices = {"flexolmo": ours.choice, "btx": btx.choice, "soup": soup}
    return SeedPlan(of_seed.stages, scoring.scored, choices, routing)
