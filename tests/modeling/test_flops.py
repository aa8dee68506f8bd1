"""Needed FLOPs against the weights themselves: two for each weight that a token meets."""

import jax
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.experts import Experts, Ranks
from flexolmo_jax.modeling.flops import (
    anchor_step_flops,
    decode_flops,
    expert_alone_step_flops,
    expert_step_flops,
    forward_flops,
    low_rank_flops,
    router_step_flops,
)
from flexolmo_jax.modeling.low_rank import FeedForwardRanks
from flexolmo_jax.modeling.transformer import abstract_model

CONFIG = ModelConfig(
    vocab_size=300, width=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_width=24
)
LENGTH = 9


def sizes(config):
    """Weights of: all attention projections, one expert of all layers, the head."""
    backbone, experts = abstract_model(config)
    attention = backbone.layers.attention
    projections = [attention.q, attention.k, attention.v, attention.o]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    return count(projections), count(experts.feed_forward), count(backbone.head)


def scores(config):
    """FLOPs a token of both attention products, at (S + 1) / 2 keys on average, all layers."""
    return config.num_layers * 2 * 2 * config.width * (LENGTH + 1) / 2


def test_forward_is_two_for_each_weight_and_the_scores():
    projections, expert, head = sizes(CONFIG)
    for active in (1, 4):
        expected = 2 * (projections + active * expert + head) + scores(CONFIG)
        assert forward_flops(CONFIG, LENGTH, active) == expected
    assert anchor_step_flops(CONFIG, LENGTH) == 3 * forward_flops(CONFIG, LENGTH, 1)


def test_an_experts_step_needs_no_gradient_of_frozen_weights():
    projections, expert, head = sizes(CONFIG)
    share = 1 - 1 / CONFIG.num_layers  # the first layer's inputs need no gradient
    back = 2 * share * (projections + expert) + 2 * share * scores(CONFIG) + 2 * head
    own = 2 * share * 2 * expert + 2 * (1 - share) * expert * (1 + 1 / 3)
    expected = forward_flops(CONFIG, LENGTH, 2) + back + own
    assert expert_step_flops(CONFIG, LENGTH) == pytest.approx(expected)


RANKS = Ranks(head=6, evidence=4)


def of_heads():
    """Weights of one expert's head and evidence head, without biases, and of the backbone's."""
    backbone, experts = abstract_model(CONFIG, RANKS)
    head, evidence = (sum((x.a.size, x.b.size)) for x in (experts.head, experts.evidence))
    return head, evidence, backbone.head.size


@pytest.mark.parametrize("flops", [forward_flops, decode_flops])
def test_heads_count_for_active_experts_and_evidence_heads_for_all(flops):
    head, evidence, public = of_heads()
    plain = flops(CONFIG, LENGTH, 2)
    assert flops(CONFIG, LENGTH, 2, RANKS) - plain == 2 * 2 * head  # nothing is routed by evidence
    routed = CONFIG.replace(num_experts=5, evidence=(0.9, 0.5, 1.0))
    expected = 2 * 2 * head + 2 * (5 * evidence + public)
    assert flops(routed, LENGTH, 2, RANKS) - plain == expected


def test_a_step_trains_both_heads_of_one_expert():
    head, evidence, public = of_heads()
    no_gradient = 2 * RANKS.evidence * CONFIG.width  # of the frozen embeddings
    expected = 3 * 2 * head + 3 * 2 * evidence - no_gradient + 2 * public
    for flops in (expert_step_flops, expert_alone_step_flops):
        assert flops(CONFIG, LENGTH, RANKS) - flops(CONFIG, LENGTH) == expected
    of_anchor = Ranks(evidence=4)
    more = anchor_step_flops(CONFIG, LENGTH, of_anchor) - anchor_step_flops(CONFIG, LENGTH)
    assert more == expected - 3 * 2 * head


DELTAS = [FeedForwardRanks(2, 3, 4), FeedForwardRanks(1, 1, 1)]


def of_factors(deltas):
    """Weights of the factors of one expert, all layers."""
    init = lambda key: Experts(CONFIG, 1, key, deltas=deltas)  # noqa: E731
    expert = jax.eval_shape(init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(expert.feed_forward))


def test_low_rank_experts_are_two_for_each_weight_and_the_base_once():
    _, base, _ = sizes(CONFIG)
    own = sum(map(of_factors, DELTAS))
    assert low_rank_flops(CONFIG, DELTAS) == 2 * (base + own)
    assert low_rank_flops(CONFIG, []) == 0


@pytest.mark.parametrize("flops", [forward_flops, decode_flops])
def test_of_a_mixture_every_expert_is_used_as_often(flops):
    _, base, _ = sizes(CONFIG)
    own = sum(map(of_factors, DELTAS))
    config = CONFIG.replace(num_experts=5)
    nothing = flops(config, LENGTH, 0)
    for active in (2, 5):
        expected = 2 * (3 * active / 5 * base + base + active / 5 * own)
        found = flops(config, LENGTH, active, deltas=DELTAS) - nothing
        assert found == pytest.approx(expected)
    plain, mixed = (router_step_flops(config, LENGTH, 5, deltas) for deltas in ((), DELTAS))
    saved = flops(config, LENGTH, 5) - flops(config, LENGTH, 5, deltas=DELTAS)
    assert plain - mixed == pytest.approx(saved * (2 - 1 / CONFIG.num_layers))


def test_of_a_low_rank_expert_only_the_factors_are_trained():
    _, base, _ = sizes(CONFIG)
    deltas = DELTAS[0]
    own, share = of_factors(deltas), 1 - 1 / CONFIG.num_layers
    # In the first layer: the input gradient of `down` and its factors, and the gradients of gate's
    # and up's narrow activations.
    inputs = CONFIG.ffn_width * 5 + (CONFIG.width + CONFIG.ffn_width) * 4
    first = 2 * ((1 - share) * (base / 3 + own) + inputs)
    more = 2 * own + 2 * share * (base + 2 * own) + first
    trained = 2 * share * 2 * base + 2 * (1 - share) * base * 4 / 3
    for flops in (expert_step_flops, expert_alone_step_flops):
        found = flops(CONFIG, LENGTH, deltas=deltas) - flops(CONFIG, LENGTH)
        assert found == pytest.approx(more - trained)
