"""The public model of the paper at full size: OLMo 2 7B, 1T tokens in batches of 4M.

    flexolmo train anchor olmo2_7b_anchor --data SOURCE --tokenizer dolma2.json --out OUT/anchor

The reference took 3 days on 512 H100 (paper, section 4.4). Not run here: the shapes are checked
without memory (tests/test_config.py).
"""

from flexolmo_jax.config import AnchorTraining, DataConfig, ModelConfig, OptimizerConfig

model = ModelConfig(
    vocab_size=100_352,
    width=4096,
    num_layers=32,
    num_heads=32,
    ffn_width=11_008,
    max_length=4096,
    rope_theta=500_000.0,
    norm_eps=1e-6,
    dtype="bfloat16",
    remat="layer",
)
config = AnchorTraining(
    model=model,
    tokenizer="dolma2.json",
    data=DataConfig(batch_size=1024, length=4096),
    optimizer=OptimizerConfig(learning_rate=9e-4, warmup_steps=2000, weight_decay=0.1),
    steps=238_419,
    public_tokens=1_048_576,
)
