"""The study on the eight domains of FlexMix-mini.

    flexolmo data fetch FETCHED && flexolmo data flexmix FETCHED flexmix
    flexolmo study configs/study/full.py --out DIR --seeds 0 1 2 --texts flexmix

Seeds may be run on different days, or side by side: start the second one with --resume when the
first has begun to train. Every method is trained with Muon; learning rates are chosen on the tuning
split, once for all seeds. All else is that of `paper.py`, which has no heads, and AdamW.
"""

import dataclasses
from pathlib import Path

from flexolmo_jax.config import OptimizerConfig, load_config
from flexolmo_jax.studies.baselines.config import StudyConfig

paper = load_config(Path(__file__).with_name("paper.py"), StudyConfig)
rates = ((1e-2, 1.5e-3), (1e-2, 4e-3), (2e-2, 4e-3))  # of matrices, and of all else

config = dataclasses.replace(
    paper,
    anchor=dataclasses.replace(
        paper.anchor,
        optimizer=OptimizerConfig(
            name="muon", learning_rate=1e-2, warmup_steps=50, weight_decay=0.1
        ),
    ),
    expert=dataclasses.replace(
        paper.expert, optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=10)
    ),
    anchor_rates=rates[1:],
    expert_rates=rates[1:],  # all that such an expert trains is matrices
    headed_rates=rates,
    dense_rates=rates,
    unrestricted_rates=rates,
    rate_owners=("math", "news"),
    head_rank=64,
    evidence_rank=64,
)
