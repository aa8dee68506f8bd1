"""Router tuning of the paper's eight experts, 37.6B parameters, four of them active in use.

    flexolmo train router flexolmo_8x7b_router --model OUT/merged --data PROXIES --out OUT/tuned

5B tokens of proxies and public text (paper, A.2); values of the reference's script, which keeps
all experts active. Not run here: tests check the shapes without memory (tests/test_config.py).
"""

from flexolmo_jax.config import DataConfig, OptimizerConfig, RouterTraining
from flexolmo_jax.config.sizes import OLMO2_7B

model = OLMO2_7B.replace(num_experts=8, active_experts=4)
config = RouterTraining(
    data=DataConfig(batch_size=128, length=4096),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
    steps=9_537,
    output_z_loss=0.0,
    router_z_loss=0.001,
)
