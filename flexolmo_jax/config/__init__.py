"""Configs: frozen dataclasses that check themselves; `configs/` holds presets."""

from flexolmo_jax.config.files import CONFIGS, find_config, load_config
from flexolmo_jax.config.model import (
    COMPUTE,
    EVIDENCE,
    MEMORY,
    ModelConfig,
    check_evidence,
    check_memory,
)
from flexolmo_jax.config.privacy import PrivacyConfig
from flexolmo_jax.config.training import (
    AnchorTraining,
    DataConfig,
    EvidenceTraining,
    ExpertTraining,
    OptimizerConfig,
    RouterTraining,
    Training,
    check_rank,
)

__all__ = [
    "COMPUTE",
    "CONFIGS",
    "EVIDENCE",
    "MEMORY",
    "AnchorTraining",
    "DataConfig",
    "EvidenceTraining",
    "ExpertTraining",
    "ModelConfig",
    "OptimizerConfig",
    "PrivacyConfig",
    "RouterTraining",
    "Training",
    "check_evidence",
    "check_memory",
    "check_rank",
    "find_config",
    "load_config",
]
