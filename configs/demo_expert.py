r"""The demo's owners: gate fixed to 1, a head and an evidence head, rows that each owner fits.

    flexolmo train expert demo_expert --data corpus:math --anchor OUT/anchor --name math \
        --out OUT/experts/math
"""

from flexolmo_jax.config import DataConfig, ExpertTraining, OptimizerConfig

config = ExpertTraining(
    data=DataConfig(batch_size=8, length=128, heldout=0.1),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=1.5e-2, adamw_learning_rate=3e-3, warmup_steps=10
    ),
    steps=250,
    checkpoint_every=250,
    head_rank=64,
    evidence_rank=64,
)
