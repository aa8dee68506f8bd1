"""The whole network: the shared backbone and stacks of experts; layers, forward passes, sizes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.attention import Attention, segment_positions
from flexolmo_jax.modeling.decode_state import DecodeState, KVCache
from flexolmo_jax.modeling.experts import Experts, moe
from flexolmo_jax.modeling.kernels.quantized import dot
from flexolmo_jax.modeling.layers import RMSNorm, Shared, normal
from flexolmo_jax.parallel import collectives


def _is_narrow_matmul(primitive, *inputs, **params) -> bool:
    """Whether this is a matmul with weights whose output is not wider than its input.

    Attention's projections and `down` are; the experts' `gate` and `up` are not.
    """
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **params):
        return False
    activations, matrix = inputs
    (contracted, _), _ = params["dimension_numbers"]
    return matrix.size <= math.prod(activations.shape[axis] for axis in contracted) ** 2


OUTPUT = "output"  # checkpoint name of the outputs of attention and experts, before their norms
_policies = jax.checkpoint_policies
REMAT = {  # what the backward pass keeps; never matrices all-gathered from other devices
    "none": _policies.save_anything_except_these_names(collectives.GATHERED),
    "matmuls": _policies.dots_with_no_batch_dims_saveable,
    "wide_matmuls": _policies.save_from_both_policies(
        _is_narrow_matmul, _policies.save_only_these_names(OUTPUT)
    ),
    "layer": _policies.nothing_saveable,
}


class LayerOutput(NamedTuple):
    x: Float[Array, "B S D"]  # the residual stream
    experts_input: Float[Array, "B S D"]  # the residual stream between attention and experts
    router_logits: Float[Array, "E B S"]  # float32
    cache: KVCache | None
    router_state: Float[Array, "E B"] | None  # float32, with config.memory


class Layer(nnx.Module):
    """What all owners share of a layer: attention, and the norms of the two outputs."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.attention = Attention(config, key)
        self.attention_norm = RMSNorm(config.num_layers, config.width)
        self.experts_norm = RMSNorm(config.num_layers, config.width)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        experts: tuple[Experts, ...],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        allowed: Bool[Array, "B E"],
        config: ModelConfig,
        state: DecodeState | None = None,
        layer_index: Int[Array, ""] | None = None,
        skip_unused: bool = False,
    ) -> LayerOutput:
        """x = x + norm(attention(x)); x = x + norm(experts(x)): norms on outputs, as in OLMo 2.

        Args:
          x: the residual stream.
          experts, allowed, skip_unused: as in `moe`.
          positions, segments, layer_index: as in `Attention`.
          config: sizes, dtype, and routing.
          state: in decoding, with the `router_state` of this layer.
        """
        out, cache = self.attention(x, positions, segments, config, state, layer_index)
        x = x + self.attention_norm(checkpoint_name(out, OUTPUT), config.norm_eps)
        experts_input = x
        out, router_logits, router_state = moe(
            x, experts, allowed, config,
            segments=segments, router_state=state and state.router_state, skip_unused=skip_unused,
        )  # fmt: skip
        x = x + self.experts_norm(checkpoint_name(out, OUTPUT), config.norm_eps)
        return LayerOutput(x, experts_input, router_logits, cache, router_state)


class Backbone(nnx.Module):
    """Everything but the experts: embedding, attention, norms, and the output head."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        ke, kl, kh = jax.random.split(key, 3)
        self.embed = Shared(normal(ke, config.vocab_size, config.width))  # [V, D]
        self.layers = Layer(config, kl)
        self.norm = RMSNorm(None, config.width)
        if not config.tie_embeddings:
            self.head = Shared(normal(kh, config.width, config.vocab_size))  # [D, V]

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "*T D"], config: ModelConfig) -> Float[Array, "*T V"]:
        """The logits of normed hidden states, in float32."""
        return dot(hidden, self.head_matrix(config), jnp.float32)

    def head_matrix(self, config: ModelConfig) -> Float[Array, "D V"]:
        """The output head, or the embedding where they are tied."""
        if hasattr(self, "head"):
            return collectives.all_gather_matrix("head", self.head[...], config)
        return collectives.all_gather_matrix("embed", self.embed[...], config).T


class Anchor(NamedTuple):
    """The public model: the shared backbone and the public expert (a stack of one)."""

    backbone: Backbone
    public: Experts


class Output(NamedTuple):
    hidden: Float[Array, "B S D"]  # after the last norm
    router_logits: Float[Array, "L E B S"]  # float32


def init_anchor(config: ModelConfig, key: jax.Array) -> Anchor:
    """A randomly initialized anchor; `jax.eval_shape` gives its shapes without using memory."""
    kb, ke = jax.random.split(key)
    return Anchor(Backbone(config, kb), Experts(config, 1, ke))


def abstract_model(config: ModelConfig) -> tuple[Backbone, Experts]:
    """Shapes and dtypes of a model with `config.num_experts` experts; allocates nothing."""

    def build(key):
        return Backbone(config, key), Experts(config, config.num_experts, key)

    return jax.eval_shape(build, jax.random.key(0))


# For each layer its shared weights and its experts, each a stack of one; no leading axis L.
Layers = tuple[tuple[Layer, tuple[Experts, ...]], ...]


def num_parameters(config: ModelConfig) -> int:
    """The number of weights, without router biases, which Hugging Face's gate does not have."""
    backbone, experts = abstract_model(config)
    biases = experts.router.bias.size
    return sum(leaf.size for leaf in jax.tree.leaves((backbone, experts))) - biases


def forward(
    backbone: Backbone,
    stacks: tuple[Experts, ...],
    tokens: Int[Array, "B S"],
    config: ModelConfig,
    *,
    segments: Int[Array, "B S"] | None = None,
    allowed: Bool[Array, " E"] | Bool[Array, "B E"] | None = None,
) -> Output:
    """Runs the network over whole sequences.

    Args:
      backbone: the shared weights.
      stacks: the experts, as one merged stack or as several (frozen and trained).
      config: sizes, dtype, and routing.
      segments: documents within a sequence; 0 is padding. Default: one document.
      allowed: experts that may be used. Default: all.
    """
    allowed = _broadcast_allowed(allowed, tokens, stacks)
    segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
    inputs = (segment_positions(segments), segments, allowed, config)
    x = collectives.embedding_lookup(backbone.embed[...], tokens, config)
    x, router_logits, _, _ = _scan_layers(backbone.layers, stacks, x, *inputs)
    return Output(backbone.norm(x, config.norm_eps), router_logits)


def forward_step(
    backbone: Backbone,
    stacks: tuple[Experts, ...],
    tokens: Int[Array, "B S"],
    state: DecodeState,
    config: ModelConfig,
    *,
    segments: Int[Array, "B S"] | None = None,
    allowed: Bool[Array, " E"] | Bool[Array, "B E"] | None = None,
    layers: Layers | None = None,
) -> tuple[Float[Array, "B S D"], DecodeState]:
    """Runs the network over the next tokens of texts: a prompt (prefill), or one token each.

    Args:
      backbone, stacks, config, allowed: as in `forward`.
      state: what is known of earlier tokens, and where these go.
      segments: 0 is padding, in a prefill. Default: none of the tokens is padding.
      layers: read instead of the stacks (inference/cpu_weights.py), in a loop instead of a scan;
        then `state.cache` is one for each layer, and unused experts are not read at all.

    Returns:
      the hidden states after the last norm; and the state with a new cache and router state.
    """
    allowed = _broadcast_allowed(allowed, tokens, stacks)
    segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
    inputs = (state.positions, segments, allowed, config)
    x = collectives.embedding_lookup(backbone.embed[...], tokens, config)
    if layers is None:
        x, _, cache, router_state = _scan_layers(backbone.layers, stacks, x, *inputs, state)
    else:
        x, cache, router_state = _loop_layers(layers, x, *inputs, state)
    state = state._replace(cache=cache, router_state=router_state)
    return backbone.norm(x, config.norm_eps), state


def _broadcast_allowed(
    allowed: jax.Array | None, tokens: jax.Array, stacks: tuple[Experts, ...]
) -> jax.Array:
    """bool [B, E]."""
    num_experts = sum(stack.router.bias.shape[1] for stack in stacks)
    if allowed is None:
        allowed = jnp.ones((num_experts,), bool)
    return jnp.broadcast_to(allowed, (len(tokens), num_experts))


def _scan_layers(layers, stacks, x, positions, segments, allowed, config, state=None):
    """Runs stacked layers; returns x, router logits, and the stacked cache and router state."""

    def layer_step(carry, slices):
        x, cache = carry
        layer, stacks, layer_index, router_state = slices
        layer = collectives.all_gather_module(layer, config)
        stacks = tuple(collectives.all_gather_experts(stack, config) for stack in stacks)
        of_layer = state and state._replace(cache=cache, router_state=router_state)
        out = layer(x, stacks, positions, segments, allowed, config, of_layer, layer_index)
        return (out.x, out.cache), (out.router_logits, out.router_state)

    if config.remat != "none" or collectives.inside_shard_map():
        layer_step = jax.checkpoint(layer_step, policy=REMAT[config.remat])
    cache, router_state = (state.cache, state.router_state) if state else (None, None)
    layer_indices = None if state is None else jnp.arange(config.num_layers)
    (x, cache), (router_logits, router_state) = jax.lax.scan(
        layer_step, (x, cache), (layers, stacks, layer_indices, router_state), unroll=config.unroll
    )
    return x, router_logits, cache, router_state


def _loop_layers(layers, x, positions, segments, allowed, config, state):
    """Runs layers one by one; returns x, the cache of each layer, and the stacked router state."""
    caches, router_states = [], []
    for index, (layer, experts) in enumerate(layers):
        before = None if state.router_state is None else state.router_state[index]
        of_layer = state._replace(cache=state.cache[index], router_state=before)
        out = layer(x, experts, positions, segments, allowed, config, of_layer, skip_unused=True)
        x = out.x
        caches.append(out.cache)
        router_states.append(out.router_state)
    router_state = None if config.memory is None else jnp.stack(router_states)
    return x, tuple(caches), router_state
