"""The study in the paper's form and ours without heads, with AdamW.

    flexolmo study configs/study/paper.py --out DIR --seeds 0 1 2 --texts flexmix

About 50 minutes a seed on one core (docs/results/paper/study_full). The learning rates of experts
and dense models were chosen on the tuning split, with this study's own anchor.
"""

from flexolmo_jax.config import (
    AnchorTraining,
    DataConfig,
    ExpertTraining,
    ModelConfig,
    OptimizerConfig,
    RouterTraining,
)
from flexolmo_jax.studies.baselines.config import StudyConfig

data = DataConfig(batch_size=8, length=128, heldout=0.0)  # the texts are split already

config = StudyConfig(
    texts="flexmix",
    owners=("math", "code", "academic", "creative", "news", "educational", "conversation"),
    anchor=AnchorTraining(
        model=ModelConfig(
            vocab_size=2048,
            width=128,
            num_layers=4,
            num_heads=4,
            ffn_width=384,
            max_length=128,
            unroll=4,
        ),
        data=data,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, weight_decay=0.1),
        steps=2700,
        checkpoint_every=900,
    ),
    expert=ExpertTraining(
        data=data,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        steps=200,
    ),
    router=RouterTraining(
        data=data,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=5, weight_decay=0.1),
        steps=60,
        active_experts=4,
        expert_compute="grouped",
    ),
)
