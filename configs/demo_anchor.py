"""The demo's public model, on the text that comes with the project.

flexolmo train anchor demo_anchor --data corpus:public --out OUT/anchor
"""

from flexolmo_jax.config import AnchorTraining, DataConfig, ModelConfig, OptimizerConfig

config = AnchorTraining(
    model=ModelConfig(
        vocab_size=2048,
        width=128,
        num_layers=4,
        num_heads=2,
        ffn_width=384,
        max_length=128,
        unroll=4,
    ),
    data=DataConfig(batch_size=8, length=128, heldout=0.1),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=2e-2,
        adamw_learning_rate=6e-3,
        warmup_steps=30,
        weight_decay=0.1,
    ),
    steps=500,
    checkpoint_every=250,
    evidence_rank=64,
)
