"""The sizes at which all sides are measured."""

from typing import NamedTuple

from flexolmo_jax.config import ModelConfig


class Size(NamedTuple):
    """A model, and the amount of work."""

    config: ModelConfig  # of the anchor: one expert
    batch: int  # sequences in a training step or a forward pass
    length: int  # tokens a sequence
    prompt: int  # tokens of a prompt
    new_tokens: int  # generated tokens of a sequence
    tokens: int  # input of the MoE layer alone
    gemm: int  # width of the square matrices that measure the machine's FLOP/s
    stream: int  # width of the square matrix that measures its bandwidth
    experts: int = 8  # of the merged model
    active: int = 4

    def merged(self) -> ModelConfig:
        """The merged model: E experts, of which A are active."""
        return self.config.replace(num_experts=self.experts, active_experts=self.active)

    def pair(self) -> ModelConfig:
        """The model in which an owner trains: the public expert and the owner's, both active."""
        return self.config.replace(num_experts=2)


SMALL = ModelConfig(
    vocab_size=8192, width=512, num_layers=8, num_heads=8, ffn_width=1408, max_length=512
)
LARGE = SMALL.replace(width=1024, num_heads=16, ffn_width=2816)
SMOKE = SMALL.replace(vocab_size=512, width=64, num_layers=2, num_heads=2, ffn_width=96)
BILLION = ModelConfig(
    vocab_size=100_352,
    width=2048,
    num_layers=16,
    num_heads=16,
    ffn_width=5632,
    max_length=4096,
    dtype="bfloat16",
    remat="layer",
)

SUITES = {
    "smoke": {"smoke": Size(SMOKE, 2, 32, 8, 8, 128, 256, 256)},
    "cpu": {
        "50M": Size(SMALL, 4, 512, 64, 128, 2048, 2048, 8192),
        "190M": Size(LARGE, 4, 512, 64, 128, 2048, 2048, 8192),
    },
    "gpu": {"1B": Size(BILLION.replace(remat="none"), 8, 2048, 128, 128, 16_384, 8192, 32_768)},
    "tpu": {"1B": Size(BILLION, 8, 4096, 512, 256, 16_384, 8192, 16_384)},
}
LAYERS = ((2, 2), (7, 5), (8, 4), (16, 2), (64, 4))  # (E, A) of the MoE layer alone
