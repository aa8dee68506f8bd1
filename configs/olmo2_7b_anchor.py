"""The public model of the paper at full size: OLMo 2 7B, 1T tokens in batches of 4M.

    flexolmo train anchor olmo2_7b_anchor --data SOURCE --tokenizer dolma2.json --out OUT/anchor

The reference took 3 days on 512 H100 (paper, section 4.4). Not run here: tests check the shapes
without memory (tests/test_config.py).
"""

from flexolmo_jax.config import AnchorTraining, DataConfig, OptimizerConfig
from flexolmo_jax.config.sizes import OLMO2_7B

model = OLMO2_7B
config = AnchorTraining(
    model=model,
    tokenizer="dolma2.json",
    data=DataConfig(batch_size=1024, length=4096),
    optimizer=OptimizerConfig(learning_rate=9e-4, warmup_steps=2000, weight_decay=0.1),
    steps=238_419,
    public_tokens=1_048_576,
)
