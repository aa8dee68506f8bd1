"""The study at the size of a test: minutes, on the text that comes with the project.

    flexolmo study configs/study/ci.py --out DIR

Every method and picture is there, but the models are too small, and see too little, for the
figures to say much. 2 cores: 4 minutes.
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

data = DataConfig(batch_size=16, length=64, heldout=0.0)

config = StudyConfig(
    texts="corpus",
    owners=("code", "math", "educational", "creative"),
    anchor=AnchorTraining(
        model=ModelConfig(
            vocab_size=1024,
            width=64,
            num_layers=2,
            num_heads=2,
            ffn_width=192,
            max_length=64,
            unroll=2,
        ),
        data=data,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20, weight_decay=0.1),
        steps=500,
        public_tokens=16_384,
    ),
    expert=ExpertTraining(
        data=data,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        steps=150,
        fit_tokens=16_384,
    ),
    router=RouterTraining(
        data=data,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=5, weight_decay=0.1),
        steps=30,
    ),
    dense_rates=((2e-3, 2e-3), (4e-3, 4e-3)),
    unrestricted_rates=((2e-3, 2e-3),),
    rate_owners=("math",),
    head_rank=16,
    evidence_rank=16,
    owner_bytes=600_000,
    tune_sequences=16,
    test_sequences=48,
    mixed_sequences=36,
    prefix=16,
    proxies=0.05,
    memories=((0.8, 0.3),),
    active=(1, 2),
    decays=(0.9,),
    evidence_decays=(0.9,),
    evidence_strengths=(0.5, 1.0),
    evidence_shifts=(0.75, 1.5),
    soup_temperatures=(0.1, 1.0),
)
