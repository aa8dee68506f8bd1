"""The share of a text that each expert takes by its router rows, or by its evidence head.

An owner's bias can only hold its expert back, but its rows may be of any length and direction: a
row along the mean of all inputs takes nearly every token, and with it the text of other owners. So
a merge routes some of the anchor's public text, which no owner's expert should take much of.
Admission routes any text (admission/routing.py).

Every layer's inputs are those of the anchor alone. So only the rows of an expert are needed, and
the result does not depend on the other experts' feed-forward networks. Evidence routing needs the
anchor's embedding and head only.
"""

import functools
import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch, stacked
from flexolmo_jax.data.sources import Document
from flexolmo_jax.data.windows import tokenized, windows
from flexolmo_jax.federation.anchor import LoadedAnchor
from flexolmo_jax.modeling.attention import segment_positions
from flexolmo_jax.modeling.experts import Experts, with_parts, with_same_parts
from flexolmo_jax.modeling.router import Router, add_decayed_logits, route
from flexolmo_jax.modeling.transformer import evidence_weights
from flexolmo_jax.parallel import placement

TOKENS = 4096  # of a text, routed
WARN = 0.4  # of the public text in a layer; honest experts take up to 0.30 (docs/security.md)
REFUSE = 0.8  # a row along the mean of all inputs takes 0.93 and more


class Shares(NamedTuple):
    """Mean weight of each expert over the tokens of a text.

    Attributes:
      names: of the experts, the public one first.
      of_layers: float64 [L, E]; every row sums to 1. [1, E] with evidence routing.
      tokens: how many were routed.
    """

    names: tuple[str, ...]
    of_layers: np.ndarray
    tokens: int

    def rows(self) -> list[dict[str, Any]]:
        """For tables and JSON: of each expert its mean share, its largest, and all of them."""
        return [
            {
                "expert": name,
                "mean": round(float(own.mean()), 4),
                "largest": round(float(own.max()), 4),
                "layers": [round(float(x), 4) for x in own],
            }
            for name, own in zip(self.names, self.of_layers.T, strict=True)
        ]


def measure_shares(
    anchor: LoadedAnchor,
    experts: Sequence[Experts],
    names: Sequence[str],
    config: ModelConfig,
    routers: Sequence[Any] | None = None,
    documents: Iterable[Document] | None = None,
    tokens: int = TOKENS,
) -> Shares | None:
    """Routes the first tokens of the anchor's public text, or of other documents.

    Args:
      anchor: its weights may be on disk; one layer is held at a time.
      experts: the public one and others; only what routes to them is used.
      names: of the experts, in that order.
      config: of the merged model: active experts, and how it routes.
      routers: each of rows [L, e, D] and biases [L, e]; end to end they are those of all experts.
        Default: the experts' own.
      documents: to route; default: the anchor's public text.
      tokens: how many are routed, at most, rounded to whole windows.

    Returns:
      None if there is no text, or the anchor came without a tokenizer.

    Raises:
      ValueError: rows give logits that are NaN.
    """
    if documents is None:
        documents = (Document(text, text) for text in anchor.public_text)
    batch = _first_batch(anchor, documents, tokens)
    if batch is None:
        return None
    if config.evidence is None:
        of_layers = _shares_by_rows(anchor, routers or [x.router for x in experts], batch, config)
    else:
        of_layers = _shares_by_evidence(anchor, experts, batch, config)
    if not np.isfinite(of_layers).all():
        raise ValueError(
            "the router rows or evidence heads of these experts give NaN on this text (they are "
            f"too large): leave out one of {', '.join(names[1:])}"
        )
    of_layers /= of_layers.sum(axis=1, keepdims=True)
    return Shares(tuple(names), of_layers, int(np.sum(np.asarray(batch.segments) > 0)))


def _shares_by_evidence(
    anchor: LoadedAnchor, experts: Sequence[Experts], batch: Batch, config: ModelConfig
) -> np.ndarray:
    """The sums of the weights, [1, E]: they are the same in all layers."""
    backbone = with_parts(anchor.weights.backbone, layers=None)
    stacks = tuple(with_parts(x, feed_forward=None, head=None) for x in with_same_parts(experts))
    weigh = jax.jit(_sums_by_evidence, static_argnames="config")
    loaded = placement.device_put((backbone, stacks), None)
    return np.asarray(weigh(*loaded, batch.tokens, batch.segments, config=config), np.float64)[None]


def _sums_by_evidence(backbone, stacks, tokens, segments, config: ModelConfig):
    allowed = jnp.ones((len(tokens), config.num_experts), bool)
    weights, _ = evidence_weights(backbone, stacks, tokens, segments, allowed, config)
    assert weights is not None
    return jnp.sum(jnp.where(segments > 0, weights, 0.0), axis=(1, 2))


def _shares_by_rows(
    anchor: LoadedAnchor, routers: Sequence[Any], batch: Batch, config: ModelConfig
) -> np.ndarray:
    """The sums of the weights in each layer, [L, E]."""
    alone = anchor.config.replace(remat="none", expert_compute="dense")
    weights = anchor.weights
    router = jax.tree.map(lambda *x: np.concatenate([np.asarray(part) for part in x], 1), *routers)
    embed = placement.device_put(weights.backbone.embed, None)
    x = embed[...][batch.tokens].astype(config.dtype)
    shares = []
    for number in range(config.num_layers):
        parts = (weights.backbone.layers, weights.public.of_layers(), router)
        layer, public, own = jax.tree.map(functools.partial(_layer_of, number), parts)
        x, share = _step(x, batch.segments, layer, public, own, alone, config)
        shares.append(np.asarray(share, np.float64))
    return np.stack(shares)


def check_shares(shares: Shares, allow: float) -> None:
    """Warns of an expert that takes much of the public text.

    Args:
      shares: what was measured.
      allow: the largest share of a layer that an expert may take.

    Raises:
      ValueError: an expert takes more.
    """
    for number, name in enumerate(shares.names[1:], 1):
        own = shares.of_layers[:, number]
        layer, most = int(own.argmax()), float(own.max())
        said = f"the expert {name!r} takes {most:.0%} of the anchor's public text"
        if len(own) > 1:  # with evidence routing all layers have the same weights
            said += f" in layer {layer} ({own.mean():.0%} on average)"
        if most > allow:
            raise ValueError(
                f"{said}, and would take other owners' text from them: expected at most "
                f"{allow:.0%}; leave it out, or allow it with --allow-share"
            )
        if most > WARN:
            warnings.warn(
                f"{said}; honest experts take less than {WARN:.0%}, and it may take other owners' "
                "text from them",
                stacklevel=3,
            )


def _first_batch(
    anchor: LoadedAnchor, documents: Iterable[Document], tokens: int = TOKENS
) -> Batch | None:
    if anchor.tokenizer is None:
        return None
    length = min(anchor.config.max_length, 256)
    cut = windows(tokenized(documents, anchor.tokenizer), length, anchor.tokenizer.separator)
    count = max(tokens // length, 1)
    return next(stacked(itertools.islice(cut, count), count), None)


def _layer_of(number: int, x: Any) -> jax.Array:
    part = (slice(number, number + 1), *(slice(None) for _ in x.shape[1:]))
    return jnp.asarray(np.asarray(x[part])[0])


@functools.partial(jax.jit, static_argnames=("alone", "config"))
def _step(x, segments, layer, public, router: Router, alone: ModelConfig, config: ModelConfig):
    """The next layer's [B, S, D], and the sum of each expert's weights in this one, [E]."""
    everyone = jnp.ones((len(x), 1), bool)
    out = layer(x, (public,), segment_positions(segments), segments, everyone, alone)
    logits = router(out.experts_input)  # [E, B, S]
    if config.memory is not None:
        nothing = jnp.zeros(logits.shape[:2])
        logits, _ = add_decayed_logits(logits, segments, config.memory, nothing)
    allowed = jnp.ones((len(x), len(logits)), bool)
    chosen = route(logits, allowed, config.active_experts or len(logits), config.renormalize)
    share = jnp.sum(jnp.where(segments > 0, chosen, 0.0), axis=(1, 2))
    return out.x, share
