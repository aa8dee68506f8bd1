r"""The demo's owners as in the paper: rows start from domain embeddings, and are trained.

    flexolmo train expert demo_expert_paper --data corpus:math --anchor OUT/anchor --name math \
        --out OUT/experts/math

Needs `pip install -e '.[embeddings]'` in a clone.
"""

from flexolmo_jax.config import DataConfig, ExpertTraining, OptimizerConfig

config = ExpertTraining(
    data=DataConfig(batch_size=16, length=128, heldout=0.1),
    optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=10),
    steps=200,
    checkpoint_every=100,
    gating="softmax",
    domain_embedding="wordllama",
    router_z_loss=0.001,
)
