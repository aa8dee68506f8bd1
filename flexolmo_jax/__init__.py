"""FlexOlmo in JAX: language models whose parts come from owners that never pool their data."""

from flexolmo_jax.config import (
    AnchorTraining,
    DataConfig,
    ExpertTraining,
    ModelConfig,
    OptimizerConfig,
    RouterTraining,
    load_config,
)
from flexolmo_jax.evaluation.domains import bits_per_byte
from flexolmo_jax.federation.merge import add_expert, merge, remove_expert
from flexolmo_jax.model import FlexOlmo, load
from flexolmo_jax.sharding import make_mesh
from flexolmo_jax.training.anchor import train_anchor
from flexolmo_jax.training.expert import train_expert
from flexolmo_jax.training.router_tuning import train_router
from flexolmo_jax.version import __version__

__all__ = [
    "AnchorTraining",
    "DataConfig",
    "ExpertTraining",
    "FlexOlmo",
    "ModelConfig",
    "OptimizerConfig",
    "RouterTraining",
    "__version__",
    "add_expert",
    "bits_per_byte",
    "load",
    "load_config",
    "make_mesh",
    "merge",
    "remove_expert",
    "train_anchor",
    "train_expert",
    "train_router",
]
