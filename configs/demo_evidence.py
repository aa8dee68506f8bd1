r"""A public evidence head for an anchor that has none.

    flexolmo train evidence demo_evidence --data corpus:public --anchor OUT/anchor \
        --out OUT/anchor_with_evidence
"""

from flexolmo_jax.config import DataConfig, EvidenceTraining, OptimizerConfig

config = EvidenceTraining(
    data=DataConfig(batch_size=8, length=128, heldout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
    steps=400,
    checkpoint_every=400,
)
