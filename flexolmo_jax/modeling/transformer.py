"""The whole network: shared backbone plus stacks of experts; forward pass and initialisation."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.attention import (
    Attention,
    KVCache,
    segment_positions,
)
from flexolmo_jax.modeling.experts import Experts, mix
from flexolmo_jax.modeling.layers import RMSNorm, Shared, dot, normal
from flexolmo_jax.parallel import collectives


def _narrow(primitive, *inputs, **params) -> bool:
    """A product of activations and a matrix that gives no more than it takes, as no gate's does."""
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **params):
        return False
    activations, matrix = inputs
    (summed, _), _ = params["dimension_numbers"]
    return matrix.size <= math.prod(activations.shape[axis] for axis in summed) ** 2


ANSWER = "answer"  # name of what attention and experts hand to the norms on their outputs
_policies = jax.checkpoint_policies
REMAT = {  # what is kept for the backward pass; never matrices gathered from other devices
    "none": _policies.save_anything_except_these_names(collectives.GATHERED),
    "matmuls": _policies.dots_with_no_batch_dims_saveable,
    "wide_matmuls": _policies.save_from_both_policies(
        _narrow, _policies.save_only_these_names(ANSWER)
    ),
    "layer": _policies.nothing_saveable,
}


class Layer(nnx.Module):
    """What all owners share of a layer: attention, and the norms on the two outputs."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.attention = Attention(config, key)
        self.attention_norm = RMSNorm(config.num_layers, config.width)
        self.experts_norm = RMSNorm(config.num_layers, config.width)

    def attend(self, x, positions, segments, config, cache=None, at=0, visible=None, number=None):
        """x + norm(attention(x)); shapes as in `Attention`."""
        out, cache = self.attention(x, positions, segments, config, cache, at, visible, number)
        out = checkpoint_name(out, ANSWER)
        return x + self.attention_norm(out, config.norm_eps), cache

    def consult(self, x, stacks, allowed, config, skip=False, segments=None, past=None):
        """x + norm(experts(x)), the router's logits and what it remembers; shapes as in `mix`."""
        out, logits, past = mix(stacks, x, allowed, config, skip, segments, past)
        out = checkpoint_name(out, ANSWER)
        return x + self.experts_norm(out, config.norm_eps), logits, past


class Backbone(nnx.Module):
    """Everything but the experts: embedding, attention, norms, output head."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        ke, kl, kh = jax.random.split(key, 3)
        self.embed = Shared(normal(ke, config.vocab_size, config.width))  # [V, D]
        self.layers = Layer(config, kl)
        self.norm = RMSNorm(None, config.width)
        if not config.tie_embeddings:
            self.head = Shared(normal(kh, config.width, config.vocab_size))  # [D, V]

    @jax.named_scope("logits")
    def logits(self, hidden: jax.Array, config: ModelConfig) -> jax.Array:
        """[..., D] (normed) -> float32 [..., V]."""
        return dot(hidden, self.head_matrix(config), jnp.float32)

    def head_matrix(self, config: ModelConfig) -> jax.Array:
        """[D, V]: the output head, or the embedding where they are tied."""
        if hasattr(self, "head"):
            return collectives.all_gather_matrix("head", self.head[...], config)
        return collectives.all_gather_matrix("embed", self.embed[...], config).T


class Anchor(NamedTuple):
    """The public model: what is shared, and the public expert (a stack of one)."""

    backbone: Backbone
    public: Experts


class Output(NamedTuple):
    hidden: jax.Array  # [B, S, D], after the last norm
    router_logits: jax.Array  # float32 [L, E, B, S]
    cache: KVCache | tuple[KVCache, ...] | None
    past: jax.Array | None  # float32 [L, E, B], with config.memory: what the router remembers


def init_anchor(config: ModelConfig, key: jax.Array) -> Anchor:
    """A random anchor; use `jax.eval_shape` on it for the shapes of a model of any size."""
    kb, ke = jax.random.split(key)
    return Anchor(Backbone(config, kb), Experts(config, 1, ke))


def abstract_model(config: ModelConfig) -> tuple[Backbone, Experts]:
    """Shapes and dtypes of a model with `config.num_experts` experts; no memory is used."""

    def build(key):
        return Backbone(config, key), Experts(config, config.num_experts, key)

    return jax.eval_shape(build, jax.random.key(0))


# Of each layer, what is shared and its experts, each a stack of one (inference/unstacked.py).
Layers = tuple[tuple[Layer, tuple[Experts, ...]], ...]


def num_parameters(config: ModelConfig) -> int:
    """Weights of the model, router biases aside (Hugging Face's gate has none)."""
    backbone, experts = abstract_model(config)
    biases = experts.router.bias.size
    return sum(leaf.size for leaf in jax.tree.leaves((backbone, experts))) - biases


def forward(
    backbone: Backbone,
    stacks: tuple[Experts, ...],
    tokens: jax.Array,
    config: ModelConfig,
    *,
    segments: jax.Array | None = None,
    allowed: jax.Array | None = None,
    cache: KVCache | tuple[KVCache, ...] | None = None,
    at: jax.Array | int = 0,
    positions: jax.Array | None = None,
    visible: jax.Array | None = None,
    past: jax.Array | None = None,
    layers: Layers | None = None,
) -> Output:
    """Runs the network: scanned over layers, or one by one where `layers` are given.

    Args:
      backbone: the shared weights.
      stacks: the experts, as one merged stack or as several (frozen and trained).
      tokens: int32 [B, S].
      config: sizes, dtype, and routing.
      segments: int32 [B, S]: documents within a row; 0 is padding. Default: one document a row.
      allowed: bool [E] or [B, E]: experts that may be used. Default: all.
      cache, at: keys and values of earlier tokens, and where this call's go.
      positions: int32 [B, S], of each token in its document; default: from `segments`.
      visible: bool [B, S_max], with a cache and S = 1: what the new token may look at. Without
        it, this call's tokens look at each other only (prefill).
      past: float32 [L, E, B], with `config.memory`: what the router remembers of earlier tokens of
        the document that each row goes on with (`Output.past`). Default: nothing came before.
      layers: read instead of the stacks (inference/unstacked.py); then `cache` is one for each
        layer, and an expert that no token uses is not read at all.
    """
    batch, length = tokens.shape
    num_experts = sum(stack.router.bias.shape[1] for stack in stacks)
    if allowed is None:
        allowed = jnp.ones((num_experts,), bool)
    allowed = jnp.broadcast_to(allowed, (batch, num_experts))
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if positions is None:
        positions = segment_positions(segments)

    def layer_step(carry, slices):
        x, cache = carry
        layer, stacks, number, past = slices
        layer = collectives.all_gather_module(layer, config)
        stacks = tuple(collectives.all_gather_experts(stack, config) for stack in stacks)
        x, cache = layer.attend(x, positions, segments, config, cache, at, visible, number)
        x, *routing = layer.consult(x, stacks, allowed, config, segments=segments, past=past)
        return (x, cache), routing

    x = collectives.embedding_lookup(backbone.embed[...], tokens, config)
    if layers is not None:
        caches, routing = [], []
        for number, (layer, experts) in enumerate(layers):
            one, before = (None if of is None else of[number] for of in (cache, past))
            x, one = layer.attend(x, positions, segments, config, one, at, visible)
            x, *found = layer.consult(x, experts, allowed, config, True, segments, before)
            caches.append(one)
            routing.append(found)
        hidden = backbone.norm(x, config.norm_eps)
        stacked = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *routing)
        return Output(hidden, stacked[0], tuple(caches) if cache else None, stacked[1])
    if config.remat != "none" or collectives.inside_shard_map():
        layer_step = jax.checkpoint(layer_step, policy=REMAT[config.remat])
    numbers = None if cache is None else jnp.arange(config.num_layers)
    (x, cache), (router_logits, past) = jax.lax.scan(
        layer_step, (x, cache), (backbone.layers, stacks, numbers, past), unroll=config.unroll
    )
    return Output(backbone.norm(x, config.norm_eps), router_logits, cache, past)
