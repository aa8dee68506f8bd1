"""AdamW, or Muon for matrices and AdamW for the rest, with linear warm-up and cosine decay."""

import dataclasses
import functools
from typing import Any

import jax
import optax

from flexolmo_jax.config import OptimizerConfig
from flexolmo_jax.storage.tensors import leaf_name
from flexolmo_jax.training.muon import kinds, scale_by_muon

NO_WEIGHT_DECAY = ("scale", "bias", "embed")  # norms, router biases, embeddings (as OLMo 2)
# Of the rate of whole matrices: both factors of a product move in a step, and each moves it.
LOW_RANK_RATE = 0.5


# Both are cached: they are in the key of the compiled step, which a second run of the same kind in
# a process then uses.
@functools.cache
def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to its peak, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
    )


@functools.cache
def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of every stage: gradient clipping, then AdamW, or Muon beside AdamW.

    Raises:
      ValueError: with Muon, `init` and `update` of a leaf that is not known (`muon.kinds`).
    """
    if config.name == "adamw":
        update = _adamw(config, steps)
    else:
        factors = _at_rate(config, LOW_RANK_RATE * config.learning_rate)
        others = _at_rate(config, config.adamw_learning_rate or config.learning_rate)
        update = optax.partition(
            {
                "full": _muon(config, steps),
                "low_rank": _muon(factors, steps),
                "other": _adamw(others, steps),
            },
            kinds,
        )
    return optax.chain(_clip_by_norms(config.clip_norm), update)


def _clip_by_norms(max_norm: float) -> optax.GradientTransformation:
    """Clips the global norm of an evidence head's gradient, and that of everything else.

    The head has a loss of its own (`objectives.evidence_loss`), so it changes nothing in how the
    other weights are trained.
    """
    clip = optax.clip_by_global_norm(max_norm)

    def update(grads, state, params=None):
        del params
        leaves, structure = jax.tree_util.tree_flatten_with_path(grads)
        is_evidence = ["evidence" in leaf_name(path).split(".") for path, _ in leaves]
        clipped = [leaf for _, leaf in leaves]
        for own in (True, False):
            places = [i for i, x in enumerate(is_evidence) if x is own]
            if places:
                updates, _ = clip.update([clipped[i] for i in places], state)
                for place, leaf in zip(places, updates, strict=True):
                    clipped[place] = leaf
        return jax.tree_util.tree_unflatten(structure, clipped), state

    return optax.GradientTransformation(clip.init, update)


def _at_rate(config: OptimizerConfig, learning_rate: float) -> OptimizerConfig:
    return dataclasses.replace(config, learning_rate=learning_rate)


def _adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decays,
    )


def _muon(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_muon(),
        optax.add_decayed_weights(config.weight_decay, _decays),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def _decays(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not leaf_name(path).endswith(NO_WEIGHT_DECAY), tree
    )
