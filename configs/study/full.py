"""The study on the eight domains of FlexMix-mini.

    flexolmo data fetch FETCHED && flexolmo data flexmix FETCHED flexmix
    flexolmo study configs/study/full.py --out DIR --seeds 0 1 2 --texts flexmix

Seeds may be run on different days, or side by side: start the second one with --resume when the
first has begun to train. Every method is trained with Muon; learning rates are chosen on the tuning
split, once for all seeds. `paper.py` is the same without heads, with AdamW.
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
rates = ((1e-2, 1.5e-3), (1e-2, 4e-3), (2e-2, 4e-3))  # of matrices, and of all else

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
        optimizer=OptimizerConfig(
            name="muon", learning_rate=1e-2, warmup_steps=50, weight_decay=0.1
        ),
        steps=2700,
        checkpoint_every=900,
    ),
    expert=ExpertTraining(
        data=data,
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=10),
        steps=200,
    ),
    router=RouterTraining(
        data=data,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=5, weight_decay=0.1),
        steps=60,
        active_experts=4,
        expert_compute="grouped",
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
