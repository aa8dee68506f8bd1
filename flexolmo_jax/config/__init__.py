"""Configs: frozen dataclasses that check themselves; `configs/` holds presets."""

from flexolmo_jax.config.files import CONFIGS, find_config, load_config
from flexolmo_jax.config.model import COMPUTE, MEMORY, ModelConfig, check_memory
from flexolmo_jax.config.privacy import PrivacyConfig
from flexolmo_jax.config.training import (
    AnchorTraining,
    DataConfig,
    ExpertTraining,
    OptimizerConfig,
    RouterTraining,
    Training,
)

__all__ = [
    "COMPUTE",
    "CONFIGS",
    "MEMORY",
    "AnchorTraining",
    "DataConfig",
    "ExpertTraining",
    "ModelConfig",
    "OptimizerConfig",
    "PrivacyConfig",
    "RouterTraining",
    "Training",
    "check_memory",
    "find_config",
    "load_config",
]
