r"""The demo's owners: the default recipe (gate fixed to 1, rows fitted against public text).

    flexolmo train expert demo_expert --data corpus:math --anchor OUT/anchor --name math \
        --out OUT/experts/math
"""

from flexolmo_jax.config import DataConfig, ExpertTraining, OptimizerConfig

config = ExpertTraining(
    data=DataConfig(batch_size=8, length=128, heldout=0.1),
    optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=10),
    steps=250,
    checkpoint_every=250,
)
