"""One owner's expert at full size, as the reference trains it: a softmax over two experts.

    flexolmo train expert flexolmo_2x7b_expert --data SOURCE --anchor OUT/anchor --name NAME \\
        --out OUT/experts/NAME

50B tokens; learning rate, warm-up, z-losses and sequence length are those of the reference's
scripts, the batch is the one its checkpoint names imply. Add `--gating fixed` for our default
recipe. Not run here: tests check the shapes without memory (tests/test_config.py).
"""

from flexolmo_jax.config import DataConfig, ExpertTraining, OptimizerConfig
from flexolmo_jax.config.sizes import OLMO2_7B

model = OLMO2_7B.replace(num_experts=2)
config = ExpertTraining(
    data=DataConfig(batch_size=1024, length=4096),
    optimizer=OptimizerConfig(learning_rate=9e-4, warmup_steps=2000),
    steps=11_921,
    gating="softmax",
    output_z_loss=1e-5,
    router_z_loss=0.001,
)
