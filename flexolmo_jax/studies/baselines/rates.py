"""The learning rates of a study: of a few for each kind of training, the best on the tuning split.

They are chosen with the anchor of seed 0, and hold for all seeds. What is trained for it are
stages of seed 0, so that the chosen ones are not trained again.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.model import load
from flexolmo_jax.studies.baselines.config import KINDS, StudyConfig
from flexolmo_jax.studies.baselines.datasets import Sequences, read_sequences
from flexolmo_jax.studies.baselines.families import load_with
from flexolmo_jax.studies.baselines.scores import bits_per_byte, score, token_nats, tuning_score
from flexolmo_jax.studies.baselines.shared_stages import SEQUENCES, Shared
from flexolmo_jax.studies.baselines.training_stages import Seed, package, trainings_of
from flexolmo_jax.studies.engine.stages import Stage, in_order, run_stages, value_stage


@dataclasses.dataclass(frozen=True)
class ChosenRates:
    """A study's config with one rate of each kind, and how they were chosen.

    Attributes:
      config: with the chosen rates.
      choices: {"chosen": rates, "tried": [{"rates", "tune"}]} by kind, of kinds with a choice.
      stages: that were run for it, shared ones and trainings of seed 0 among them.
    """

    config: StudyConfig
    choices: dict[str, Any]
    stages: list[Stage]


def choose_rates(
    config: StudyConfig,
    shared: Shared,
    run: Callable[[Sequence[Stage]], None] = run_stages,
) -> ChosenRates:
    """Chooses the rates of every kind of training, one kind after the other.

    Args:
      config: of the study.
      shared: the stages that do not depend on a seed.
      run: runs stages; one that raises lets nothing be trained.
    """
    choices: dict[str, Any] = {}
    stages: list[Stage] = []
    for kind in KINDS:
        rates = getattr(config, f"{kind}_rates")
        if len(rates) > 1 and _is_trained(config, kind):
            choice = _choice(config, shared, kind)
            needed = in_order([choice])
            run(needed)
            stages += needed
            choices[kind] = choice.result
            rates = (tuple(choice.result["chosen"]),)
        config = config.with_rates(kind, rates[:1])
    return ChosenRates(config, choices, stages)


def _is_trained(config: StudyConfig, kind: str) -> bool:
    has = {"headed": config.has_heads, "unrestricted": bool(config.unrestricted_flops)}
    return has.get(kind, True)


def _choice(config: StudyConfig, shared: Shared, kind: str) -> Stage:
    """The stage that chooses the rates of one kind; kinds before it have one each."""
    owners = config.rate_owners or config.owners
    trials = []
    for rates in getattr(config, f"{kind}_rates"):
        trial = Seed(config.with_rates(kind, (rates,)), shared, 0)
        trials.append((rates, trial, trainings_of(trial, kind, owners)))

    def compute(_: Path) -> dict[str, Any]:
        sequences = read_sequences(shared.sequences.folder / SEQUENCES)
        tried = [
            {"rates": rates, "tune": _tuning_bits(kind, trained, trial.stages[0], sequences)}
            for rates, trial, trained in trials
        ]
        best = min(tried, key=lambda one: one["tune"])
        return {"chosen": best["rates"], "tried": tried}

    needs = [shared.sequences, *(s for _, trial, _ in trials for s in trial.stages)]
    rates = [rates for rates, _, _ in trials]
    return value_stage(
        f"seed0/rates/{kind}", shared.pool.root, needs, compute, rates=rates, owners=owners
    )


def _tuning_bits(
    kind: str, trained: Mapping[str, Stage], anchor: Stage, sequences: Mapping[str, Sequences]
) -> float:
    """Bits per byte on the tuning split, the mean over what was trained."""
    if kind == "unrestricted":
        (stage,) = trained.values()
        model = load_with(package(stage) / "merged", stage.folder, expert_compute="grouped")
        names = [name for name in sequences if name.startswith("tune.")]
        return tuning_score(score(model, sequences, names), sequences)
    bits = []
    for domain, stage in trained.items():
        beside = package(anchor) if kind in ("expert", "headed") else None
        without = ("public",) if beside else ()
        one = sequences[f"tune.{domain}"]
        nats = token_nats(load(package(stage), anchor=beside), one, without=without)
        bits.append(bits_per_byte(nats, one.sizes))
    return float(np.mean(bits))
