"""Per-token losses of a model on a study's sequences, and its routing, stored as arrays."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.modeling.router import add_decayed_logits, route
from flexolmo_jax.modeling.transformer import forward
from flexolmo_jax.storage.files import new_file
from flexolmo_jax.studies.baselines.datasets import MIXED, Sequences

BATCH = 16
Scores = dict[str, np.ndarray]  # by the sequences' name: float32 [N, S], nats of each token


def token_nats(model: FlexOlmo, sequences: Sequences, *, without: Sequence[str] = ()) -> np.ndarray:
    """Cost in nats of every predicted token that is text, else 0: float32 [N, S]."""
    return nats_of_text(
        lambda tokens: -model.log_likelihoods(tokens, without=without).log_probabilities[..., 0],
        sequences,
    )


def nats_of_text(
    nats_of: Callable[[np.ndarray], np.ndarray | jax.Array], sequences: Sequences
) -> np.ndarray:
    """`token_nats`, given a function from a batch [BATCH, S + 1] to its costs [BATCH, S]."""
    out = [nats_of(tokens) for tokens in _batches(sequences.tokens)]
    nats = np.concatenate(out)[: len(sequences.tokens)]
    return np.where(sequences.sizes > 0, nats, 0.0).astype(np.float32)


def _batches(tokens: np.ndarray) -> Iterable[np.ndarray]:
    """[BATCH, S + 1] each; the last batch is padded with copies of its last row."""
    for start in range(0, len(tokens), BATCH):
        part = tokens[start : start + BATCH]
        yield np.concatenate([part, np.repeat(part[-1:], BATCH - len(part), axis=0)])


def score(
    model: FlexOlmo,
    sequences: Mapping[str, Sequences],
    names: Iterable[str],
    *,
    without: Sequence[str] = (),
) -> Scores:
    """`token_nats` of several sets of sequences."""
    return {name: token_nats(model, sequences[name], without=without) for name in names}


def save_scores(file: Path, scores: Scores) -> None:
    """Writes scores, all at once."""
    with new_file(file, "wb") as opened:
        np.savez(opened, **scores)  # type: ignore[arg-type]


def load_scores(file: Path) -> Scores:
    """What `save_scores` wrote."""
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays}


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray) -> float:
    """Bits per byte over all tokens; both arrays have the same shape."""
    return float(nats.sum(dtype=np.float64) / np.log(2) / sizes.sum(dtype=np.float64))


def tuning_score(scores: Scores, sequences: Mapping[str, Sequences]) -> float:
    """The criterion of every choice of the study: bits per byte on the tuning split.

    The mean of two: the mean over the domains, and the sequences that change their domain.
    """
    values = {
        name: bits_per_byte(scores[name], one.sizes)
        for name, one in sequences.items()
        if name.startswith("tune.")
    }
    mixed = values.pop(f"tune.{MIXED}")
    return (float(np.mean(list(values.values()))) + mixed) / 2


def routing_shares(model: FlexOlmo, sequences: Sequences) -> np.ndarray:
    """Mean weight of each expert over tokens that are text, scaled to sum to 1: float [L, E].

    [1, E] of a model that is routed by evidence: all its layers have the same weights.
    """
    total = np.zeros(0)
    for start, tokens in enumerate(_batches(sequences.tokens)):
        sizes = sequences.sizes[start * BATCH : (start + 1) * BATCH]
        is_text = np.zeros((BATCH, sizes.shape[1]), np.float32)
        is_text[: len(sizes)] = sizes > 0
        part = _weight_sums(model.backbone, model.experts, tokens[:, :-1], is_text, model.config)
        total = np.asarray(part) if start == 0 else total + np.asarray(part)
    return total / total.sum(axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames="config")
def _weight_sums(backbone, experts, tokens, is_text, config) -> jax.Array:
    out = forward(backbone, (experts,), tokens, config)
    if config.evidence is not None:
        weights = out.weights / jnp.sum(out.weights, axis=0)
        return jnp.sum(weights * is_text, axis=(1, 2))[None]
    segments = jnp.ones(tokens.shape, jnp.int32)
    everyone = jnp.ones((len(tokens), config.num_experts), bool)

    def layer(logits):  # [E, B, S]
        if config.memory is not None:
            nothing = jnp.zeros(logits.shape[:2])
            logits, _ = add_decayed_logits(logits, segments, config.memory, nothing)
        active = config.active_experts or config.num_experts
        weights = route(logits, everyone, active, config.renormalize)
        weights = weights / jnp.sum(weights, axis=0)
        return jnp.sum(weights * is_text, axis=(1, 2))

    return jax.lax.map(layer, out.router_logits)
