"""Floating-point operations that a stage needs: matmuls only, each of them once.

Needed means: no gradient of a frozen weight, no input gradient that nothing uses, no attention to
later tokens, no expert that a token is not routed to. Whatever a program computes beyond that
lowers its measured fraction of the machine's peak.
"""

from collections.abc import Sequence
from typing import NamedTuple

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.experts import NO_HEADS, Ranks
from flexolmo_jax.modeling.low_rank import FeedForwardRanks

Deltas = Sequence[FeedForwardRanks]


def forward_flops(
    config: ModelConfig, length: int, active: int, ranks: Ranks = NO_HEADS, deltas: Deltas = ()
) -> float:
    """FLOPs per token of a forward pass over sequences of `length` tokens (one document each).

    Args:
      config: sizes; with `evidence`, every expert's evidence head scores every token.
      length: S; a token attends to (S + 1) / 2 tokens on average.
      active: experts per token (A), whose heads add to the logits.
      ranks: of the experts' heads.
      deltas: of the low-rank experts among `config.num_experts`; each expert is used as often.
    """
    layer = _projections(config) + _scores(config, length)
    layer += _experts(config, active, deltas)
    heads = active * low_rank_head_flops(config, ranks.head) + evidence_flops(
        config, ranks.evidence
    )
    return config.num_layers * layer + _head(config) + heads


def low_rank_head_flops(config: ModelConfig, rank: int) -> float:
    """FLOPs per token of a low-rank head of one expert: D R + R V products."""
    return 2.0 * rank * (config.width + config.vocab_size)


def evidence_flops(config: ModelConfig, rank: int) -> float:
    """FLOPs per token of evidence routing, if the config has it, with evidence heads of this rank.

    E (D R + R V) products, and the D V of the backbone's head.
    """
    if config.evidence is None:
        return 0.0
    return config.num_experts * low_rank_head_flops(config, rank) + _head(config)


def low_rank_flops(config: ModelConfig, deltas: Deltas, share: float = 1.0) -> float:
    """FLOPs per token of a forward pass of low-rank experts (low_rank.py).

    They need the base's three products once for all of them, and the products with their factors.

    Args:
      config: sizes.
      deltas: of each expert.
      share: of the tokens, which use an expert.
    """
    if not deltas:
        return 0.0
    factors = share * sum(_factors(config, own) for own in deltas)
    return config.num_layers * (_expert(config) + factors)


def anchor_step_flops(config: ModelConfig, length: int, ranks: Ranks = NO_HEADS) -> float:
    """FLOPs per token of a training step of the whole anchor: backward costs twice the forward.

    Its evidence head has a loss of its own (`objectives.evidence_loss`).
    """
    return 3 * forward_flops(config, length, active=1) + _own_heads(config, ranks)


def expert_step_flops(
    config: ModelConfig,
    length: int,
    ranks: Ranks = NO_HEADS,
    deltas: FeedForwardRanks | None = None,
) -> float:
    """FLOPs per token of a training step of one expert beside the frozen anchor, with both active.

    The backward pass computes one matmul for every frozen one (the gradient of its input), two for
    attention scores (both factors are activations), and two for the owner's expert (input and
    weight). In the first layer nothing before the experts needs a gradient, and the owner's expert
    needs only the gradients of its weights and of the input of `down`. Its head costs three times
    its forward pass, as its evidence head does without the gradient of the embeddings. Of a
    low-rank expert only the factors are trained: the products with its base are frozen.
    """
    own = _trained(config, deltas)
    back = _projections(config) + 2 * _scores(config, length) + _expert(config) + own.back
    forward = forward_flops(config, length, active=2) + config.num_layers * own.more
    rest = own.first_back + _head(config) + _own_heads(config, ranks)
    return forward + (config.num_layers - 1) * back + rest


def expert_alone_step_flops(
    config: ModelConfig,
    length: int,
    ranks: Ranks = NO_HEADS,
    deltas: FeedForwardRanks | None = None,
) -> float:
    """FLOPs per token of a training step of one expert with gating "alone"; else as above."""
    own = _trained(config, deltas)
    back = _projections(config) + 2 * _scores(config, length) + own.back
    forward = forward_flops(config, length, active=1) + config.num_layers * own.more
    rest = own.first_back + _head(config) + _own_heads(config, ranks)
    return forward + (config.num_layers - 1) * back + rest


class _Trained(NamedTuple):
    """FLOPs per token and layer of an expert that is trained."""

    more: float  # of the forward pass, beside a full expert's
    back: float
    first_back: float  # in the first layer, whose input needs no gradient


def _trained(config: ModelConfig, deltas: FeedForwardRanks | None) -> _Trained:
    expert = _expert(config)
    if deltas is None:
        return _Trained(0.0, 2 * expert, expert + expert / 3)
    factors = _factors(config, deltas)
    # Input gradients: of `down` and its factors, and of the narrow activations of gate and up.
    inputs = 2.0 * config.ffn_width * (deltas.gate + deltas.up)
    inputs += 2.0 * (config.width + config.ffn_width) * deltas.down
    return _Trained(factors, expert + 2 * factors, expert / 3 + factors + inputs)


def router_step_flops(config: ModelConfig, length: int, active: int, deltas: Deltas = ()) -> float:
    """FLOPs per token of a training step of the router rows; arguments as in `forward_flops`.

    The backward pass computes one matmul for every one of the forward pass (the gradient of its
    input) and two for attention scores; the first layer's inputs need no gradient.
    """
    back = _projections(config) + 2 * _scores(config, length) + _experts(config, active, deltas)
    forward = forward_flops(config, length, active, deltas=deltas)
    return forward + (config.num_layers - 1) * back + _head(config)


def decode_flops(
    config: ModelConfig, length: int, active: int, ranks: Ranks = NO_HEADS, deltas: Deltas = ()
) -> float:
    """FLOPs of decoding one token, with `length` tokens in the cache; else as `forward_flops`."""
    attention = 4.0 * config.num_heads * config.head_size * length
    layer = _projections(config) + attention + _experts(config, active, deltas)
    heads = active * low_rank_head_flops(config, ranks.head) + evidence_flops(
        config, ranks.evidence
    )
    return config.num_layers * layer + _head(config) + heads


def _projections(config: ModelConfig) -> float:
    heads = 2 * config.num_heads + 2 * config.kv_heads
    return 2.0 * config.width * heads * config.head_size


def _scores(config: ModelConfig, length: int) -> float:
    return 4.0 * config.num_heads * config.head_size * (length + 1) / 2


def _experts(config: ModelConfig, active: int, deltas: Deltas) -> float:
    """Of one layer, with `active` of all experts per token."""
    share = active / config.num_experts
    full = active - share * len(deltas)
    return full * _expert(config) + low_rank_flops(config, deltas, share) / config.num_layers


def _factors(config: ModelConfig, deltas: FeedForwardRanks) -> float:
    return 2.0 * (config.width + config.ffn_width) * sum(deltas)


def _expert(config: ModelConfig) -> float:
    return 6.0 * config.width * config.ffn_width


def _head(config: ModelConfig) -> float:
    return 2.0 * config.width * config.vocab_size


def _own_heads(config: ModelConfig, ranks: Ranks) -> float:
    """Of a training step, for one expert's own head and evidence head."""
    total = 3 * low_rank_head_flops(config, ranks.head)
    if ranks.evidence:
        of_embeddings = 2.0 * ranks.evidence * config.width  # whose gradient nothing uses
        total += 3 * low_rank_head_flops(config, ranks.evidence) - of_embeddings + _head(config)
    return total
