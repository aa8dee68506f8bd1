"""Router tuning of the released size: public and six experts, 33,270,665,216 parameters.

    flexolmo train router flexolmo_7x7b_router --model OUT/merged --data PROXIES --out OUT/tuned

5B tokens of proxies and public text (paper, A.2); values of the reference's script, which keeps
all experts active. Not run here: the shapes are checked without memory (tests/test_config.py).
"""

from flexolmo_jax.config import DataConfig, ModelConfig, OptimizerConfig, RouterTraining

model = ModelConfig(
    vocab_size=100_352,
    width=4096,
    num_layers=32,
    num_heads=32,
    ffn_width=11_008,
    num_experts=7,
    dtype="bfloat16",
    remat="layer",
)
config = RouterTraining(
    data=DataConfig(batch_size=128, length=4096),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
    steps=9_537,
    output_z_loss=0.0,
    router_z_loss=0.001,
)
