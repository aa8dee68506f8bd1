r"""Router tuning at the demo's size, on proxies that owners picked from public text.

flexolmo data proxies --data corpus:math --public corpus:public --out PROXIES/math.jsonl
flexolmo train router demo_router --model OUT/merged --data PROXIES --out OUT/tuned
"""

from flexolmo_jax.config import DataConfig, OptimizerConfig, RouterTraining

config = RouterTraining(
    data=DataConfig(batch_size=16, length=128, heldout=0.1),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=10, weight_decay=0.1),
    steps=60,
    checkpoint_every=60,
)
