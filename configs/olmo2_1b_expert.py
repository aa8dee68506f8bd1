r"""An expert beside a released OLMo 2 1B: gate fixed to 1, a head and an evidence head.

    flexolmo train expert olmo2_1b_expert --data SOURCE --anchor ANCHOR --name NAME --out OUT

ANCHOR is what `flexolmo train evidence` makes of OLMo-2-0425-1B. 1M tokens in
float32, for one GPU with 80 GB: `tpu_scripts/heads.sh` compares it with an expert without heads. No
GPU has run it yet, and its learning rates were not chosen by any measurement.
"""

from flexolmo_jax.config import DataConfig, ExpertTraining, OptimizerConfig

config = ExpertTraining(
    data=DataConfig(batch_size=8, length=1024, heldout=0.0),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=2e-3, adamw_learning_rate=1e-3, warmup_steps=20
    ),
    steps=125,
    checkpoint_every=125,
    head_rank=64,
    evidence_rank=64,
)
