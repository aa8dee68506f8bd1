"""The stages of a study for one seed: every model that is trained, chosen and scored, in order."""

import dataclasses

from flexolmo_jax.studies.baselines import evidence_stages
from flexolmo_jax.studies.baselines import score_stages as stages
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.shared_stages import Shared
from flexolmo_jax.studies.baselines.training_stages import Seed, plan_trainings
from flexolmo_jax.studies.engine.stages import Stage


@dataclasses.dataclass(frozen=True)
class SeedPlan:
    """The stages of one seed, in order.

    Attributes:
      stages: all.
      scored: those that hold a model's scores, by name.
      choices: those that chose a form, by the name of the family.
      routing: those that hold the experts' weights, by the name of the family.
    """

    stages: list[Stage]
    scored: dict[str, Stage]
    choices: dict[str, Stage]
    routing: dict[str, Stage]


def plan_seed(config: StudyConfig, shared: Shared, seed: int) -> SeedPlan:
    """The stages of one seed; nothing is run.

    Args:
      config: of the study, with one rate of each kind (`rates.choose_rates`).
      shared: what does not depend on the seed.
      seed: of all trainings.
    """
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
    families = {"flexolmo": ours}
    choices = {"flexolmo": ours.choice, "btx": btx.choice, "soup": soup}
    if config.has_heads:
        headed = evidence_stages.add_headed(scoring)
        families |= {"evidence": headed["evidence"]}
        choices |= {name: family.choice for name, family in headed.items()}
    routing = {
        name: stages.routing_stage(scoring, name, family) for name, family in families.items()
    }
    return SeedPlan(of_seed.stages, scoring.scored, choices, routing)
