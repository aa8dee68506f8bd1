"""AdamW with linear warm-up and cosine decay."""

import jax
import optax

from flexolmo_jax.config import OptimizerConfig
from flexolmo_jax.storage.tensors import leaf_name

NO_WEIGHT_DECAY = ("scale", "bias", "embed")  # norms, router biases, embeddings (as OLMo 2)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to its peak, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of every stage: gradient clipping, then AdamW."""

    def decays(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not leaf_name(path).endswith(NO_WEIGHT_DECAY), tree
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )
