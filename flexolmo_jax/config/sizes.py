"""Sizes of published models, for the presets in `configs/`."""

from flexolmo_jax.config.model import ModelConfig

# OLMo 2 7B, the public model of the paper.
OLMO2_7B = ModelConfig(
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
