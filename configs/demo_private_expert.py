r"""An expert with differential privacy, for a demo's owner with a few thousand short documents.

    flexolmo train expert demo_private_expert --data corpus:math --anchor flexolmo_demo/anchor \
        --name math --out math --dp-epsilon 8 --dp-windows 2

The noise differs each time.
"""

from flexolmo_jax.config import DataConfig, ExpertTraining, OptimizerConfig

config = ExpertTraining(
    data=DataConfig(batch_size=128, length=128, heldout=0.1),  # 128 documents in the mean batch
    optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=10),
    steps=80,
    checkpoint_every=80,
)
