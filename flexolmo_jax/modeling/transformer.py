"""The whole network: the shared backbone and stacks of experts; layers, forward passes, sizes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling import evidence
from flexolmo_jax.modeling.attention import Attention, segment_positions
from flexolmo_jax.modeling.decode_state import DecodeState, EvidenceState, KVCache
from flexolmo_jax.modeling.experts import NO_HEADS, Experts, LayerExperts, Ranks, moe
from flexolmo_jax.modeling.kernels.quantized import Quantized, dot
from flexolmo_jax.modeling.layers import RMSNorm, Shared, normal
from flexolmo_jax.modeling.router import route
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
    router_logits: Float[Array, "E B S"] | None  # float32; None if `weights` were given
    weights: Float[Array, "E B S"]  # of the experts, float32
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
        experts: tuple[LayerExperts, ...],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        allowed: Bool[Array, "B E"],
        config: ModelConfig,
        state: DecodeState | None = None,
        layer_index: Int[Array, ""] | None = None,
        weights: Float[Array, "E B S"] | None = None,
    ) -> LayerOutput:
        """x = x + norm(attention(x)); x = x + norm(experts(x)): norms on outputs, as in OLMo 2.

        Args:
          x: the residual stream.
          experts, allowed, weights: as in `moe`.
          positions, segments, layer_index: as in `Attention`.
          config: sizes, dtype, and routing.
          state: in decoding, with the `router_state` of this layer.
        """
        out, cache = self.attention(x, positions, segments, config, state, layer_index)
        x = x + self.attention_norm(checkpoint_name(out, OUTPUT), config.norm_eps)
        experts_input = x
        mixed = moe(
            x, experts, allowed, config,
            segments=segments, router_state=state and state.router_state, weights=weights,
            lengths=state and state.lengths,
        )  # fmt: skip
        x = x + self.experts_norm(checkpoint_name(mixed.out, OUTPUT), config.norm_eps)
        return LayerOutput(x, experts_input, mixed.logits, mixed.weights, cache, mixed.router_state)


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
    router_logits: Float[Array, "L E B S"] | None  # float32; None in evidence routing
    weights: Float[Array, "E B S"]  # float32, of the last layer: the experts' heads have them too
    mean_weights: Float[Array, "E B S"]  # float32, mean over the layers


def init_anchor(config: ModelConfig, key: jax.Array, ranks: Ranks = NO_HEADS) -> Anchor:
    """A randomly initialized anchor; `jax.eval_shape` gives its shapes without using memory."""
    kb, ke = jax.random.split(key)
    return Anchor(Backbone(config, kb), Experts(config, 1, ke, ranks))


def abstract_model(config: ModelConfig, ranks: Ranks = NO_HEADS) -> tuple[Backbone, Experts]:
    """Shapes and dtypes of a model with `config.num_experts` experts; allocates nothing."""

    def build(key):
        return Backbone(config, key), Experts(config, config.num_experts, key, ranks)

    return jax.eval_shape(build, jax.random.key(0))


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
    weights, _ = evidence_weights(backbone, stacks, tokens, segments, allowed, config)
    out = _scan_layers(backbone.layers, stacks, x, *inputs, weights=weights)
    hidden = backbone.norm(out.x, config.norm_eps)
    return Output(hidden, out.router_logits, out.weights, out.mean_weights)


def forward_step(
    backbone: Backbone,
    stacks: tuple[Experts, ...],
    tokens: Int[Array, "B S"],
    state: DecodeState,
    config: ModelConfig,
    *,
    segments: Int[Array, "B S"] | None = None,
    allowed: Bool[Array, " E"] | Bool[Array, "B E"] | None = None,
) -> tuple[Output, DecodeState]:
    """Runs the network over the next tokens of texts: a prompt (prefill), or one token each.

    Args:
      backbone, stacks, config, allowed: as in `forward`.
      state: what is known of earlier tokens, and where these go.
      segments: 0 is padding, in a prefill. Default: none of the tokens is padding.

    Returns:
      the output; and the state with a new cache and routing state.
    """
    allowed = _broadcast_allowed(allowed, tokens, stacks)
    segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
    inputs = (state.positions, segments, allowed, config)
    x = collectives.embedding_lookup(backbone.embed[...], tokens, config)
    weights, of_evidence = evidence_weights(
        backbone, stacks, tokens, segments, allowed, config, state.evidence, lengths=state.lengths
    )
    out = _scan_layers(backbone.layers, stacks, x, *inputs, state, weights)
    state = state._replace(cache=out.cache, router_state=out.router_state, evidence=of_evidence)
    hidden = backbone.norm(out.x, config.norm_eps)
    return Output(hidden, out.router_logits, out.weights, out.mean_weights), state


def evidence_weights(
    backbone: Backbone,
    stacks: tuple[Experts, ...],
    tokens: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    allowed: Bool[Array, "B E"],
    config: ModelConfig,
    state: EvidenceState | None = None,
    head: jax.Array | Quantized | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "E B S"] | None, EvidenceState | None]:
    """The weights of evidence routing (evidence.py), and its next state; None without it.

    Args:
      state: of the tokens before; None: there are none.
      head: read instead of the backbone's, [D, V].
      lengths: the tokens of each sequence that the next state knows; what comes after is padding.
        Default: all.
      other arguments: as in `forward`; each stack has the part `evidence`.
    """
    if config.evidence is None:
        return None, None
    if state is None:
        state = EvidenceState.empty(allowed.shape[1], len(tokens))
    previous = jnp.concatenate([state.last_tokens[:, None], tokens[:, :-1]], axis=1)
    embedded = collectives.embedding_lookup(backbone.embed[...], jnp.maximum(previous, 0), config)
    hidden = backbone.norm(embedded, config.norm_eps)
    matrix = backbone.head_matrix(config) if head is None else head
    scores = jnp.concatenate(
        [
            evidence.log_probabilities(stack.evidence, hidden, matrix, tokens, config.loss_chunk)
            for stack in stacks
        ]
    )
    ratios = jnp.where(evidence.follows(segments, previous), scores - scores[:1], 0.0)
    logits, sums = evidence.evidence_logits(ratios, segments, config.evidence, state.sums, lengths)
    active = config.active_experts or len(logits)
    weights = route(logits, allowed, active, config.renormalize)
    last = tokens[:, -1] if lengths is None else tokens[jnp.arange(len(tokens)), lengths - 1]
    return weights, EvidenceState(sums, last)


def output_logits(
    backbone: Backbone,
    stacks: tuple[Experts, ...],
    hidden: Float[Array, "*T D"],
    weights: Float[Array, "E ..."],
    config: ModelConfig,
) -> Float[Array, "*T V"]:
    """The model's logits, float32: of the backbone's head, and of the experts' own.

    Args:
      hidden, weights: of any positions of an `Output`.
    """
    return add_heads(backbone.logits(hidden, config), stacks, hidden, weights)


def head_columns(
    backbone: Backbone, stacks: tuple[Experts, ...], out: Output, config: ModelConfig
) -> tuple[Float[Array, "B S W"], Float[Array, "W V"]]:
    """Hidden states and a head whose matmul gives the model's logits, for the loss.

    Equal to `output_logits` up to rounding; but an expert whose weight is 0 may not be NaN.
    """
    columns, rows, first = [out.hidden], [backbone.head_matrix(config)], 0
    for stack in stacks:
        last = first + stack.router.bias.shape[1]
        if hasattr(stack, "head"):
            more, own = stack.head.columns(out.hidden, out.weights[first:last])
            columns.append(more)
            rows.append(own)
        first = last
    if len(rows) == 1:
        return columns[0], rows[0]
    return jnp.concatenate(columns, axis=-1), jnp.concatenate(
        [x.astype(out.hidden.dtype) for x in rows]
    )


def add_heads(
    logits: Float[Array, "*T V"],
    stacks: tuple[Experts, ...],
    hidden: Float[Array, "*T D"],
    weights: Float[Array, "E ..."],
) -> Float[Array, "*T V"]:
    """Adds what the experts' own heads say to the logits of the backbone's head."""
    first = 0
    for stack in stacks:
        last = first + stack.router.bias.shape[1]
        if hasattr(stack, "head"):
            logits = stack.head.add(logits, hidden, weights[first:last])
        first = last
    return logits


def _broadcast_allowed(
    allowed: jax.Array | None, tokens: jax.Array, stacks: tuple[Experts, ...]
) -> jax.Array:
    """bool [B, E]."""
    num_experts = sum(stack.router.bias.shape[1] for stack in stacks)
    if allowed is None:
        allowed = jnp.ones((num_experts,), bool)
    return jnp.broadcast_to(allowed, (len(tokens), num_experts))


class _LayersOutput(NamedTuple):
    x: jax.Array
    router_logits: jax.Array | None  # stacked
    weights: jax.Array  # of the last layer
    mean_weights: jax.Array
    cache: Any
    router_state: jax.Array | None  # stacked


def _scan_layers(
    layers, stacks, x, positions, segments, allowed, config, state=None, weights=None
) -> _LayersOutput:
    """Runs stacked layers."""

    def layer_step(carry, slices):
        x, cache = carry
        layer, stacks, layer_index, router_state = slices
        layer = collectives.all_gather_module(layer, config)
        stacks = tuple(stack.gathered(config) for stack in stacks)
        of_layer = state and state._replace(cache=cache, router_state=router_state)
        out = layer(x, stacks, positions, segments, allowed, config, of_layer, layer_index, weights)
        return (out.x, out.cache), (out.router_logits, out.router_state, out.weights)

    if config.remat != "none" or collectives.inside_shard_map():
        layer_step = jax.checkpoint(layer_step, policy=REMAT[config.remat])
    cache, router_state = (state.cache, state.router_state) if state else (None, None)
    layer_indices = None if state is None else jnp.arange(config.num_layers)
    stacks = tuple(stack.of_layers() for stack in stacks)
    (x, cache), (router_logits, router_state, of_layers) = jax.lax.scan(
        layer_step, (x, cache), (layers, stacks, layer_indices, router_state), unroll=config.unroll
    )
    last = mean = weights
    if weights is None:
        last, mean = of_layers[-1], jnp.mean(of_layers, axis=0)
    return _LayersOutput(x, router_logits, last, mean, cache, router_state)
