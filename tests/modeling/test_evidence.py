"""Evidence routing and the experts' own heads, against slow, obvious computations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.model import FlexOlmo
from flexolmo_jax.modeling.experts import Ranks, join, pad_experts, select, with_parts
from flexolmo_jax.modeling.heads import RANK_BLOCK
from flexolmo_jax.modeling.transformer import (
    Anchor,
    abstract_model,
    evidence_weights,
    forward,
    output_logits,
)
from flexolmo_jax.training.objectives import (
    AnchorLoss,
    ExpertAloneLoss,
    OwnParts,
    language_model_loss,
)

BASE = ModelConfig(
    vocab_size=50, width=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=24,
    num_experts=4, evidence=(0.8, 1.5, 0.4), loss_chunk=4,
)  # fmt: skip
BATCH, LENGTH = 3, 11
RANKS = Ranks(head=3, evidence=5)


def random_model(config, ranks=RANKS, seed=0):
    """A backbone and a stack, with nothing left at 0 or 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        drawn = 0.3 * rng.standard_normal(leaf.shape, np.float32)
        is_router_bias = "router" in name and "bias" in name
        return jnp.asarray(
            1 + drawn if "norm" in name else -abs(drawn) if is_router_bias else drawn
        )

    return jax.tree_util.tree_map_with_path(draw, abstract_model(config, ranks))


def random_tokens(seed=0, shape=(BATCH, LENGTH)):
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnames="config")
def run(backbone, stacks, tokens, config, segments=None, allowed=None):
    """Logits [B, S, V] and the weights of the last layer [E, B, S]."""
    out = forward(backbone, stacks, tokens, config, segments=segments, allowed=allowed)
    return output_logits(backbone, stacks, out.hidden, out.weights, config), out.weights


def mask(*kept):
    rows = np.zeros((BATCH, BASE.num_experts), bool)
    for row in range(BATCH):
        rows[row, kept[row % len(kept)]] = True
    return rows


def of_host(head, expert):
    return (np.asarray(x[0, expert], np.float64) for x in (head.a, head.b, head.bias))


def log_softmax(x):
    return x - np.log(np.sum(np.exp(x - x.max()))) - x.max()


def obvious_weights(backbone, experts, tokens, segments, config):
    """Token by token and expert by expert, in float64."""
    decay, strength, shift = config.evidence
    embed = np.asarray(backbone.embed[...], np.float64)
    head = np.asarray(backbone.head[...], np.float64)
    scale = np.asarray(backbone.norm.scale[...], np.float64)
    weights = np.zeros((config.num_experts, *tokens.shape))
    for row in range(len(tokens)):
        sums = np.zeros(config.num_experts)
        for t in range(tokens.shape[1]):
            ratio = np.zeros(config.num_experts)
            starts = t == 0 or segments[row, t] != segments[row, t - 1]
            sums *= 0 if starts else decay
            if not starts:
                x = embed[tokens[row, t - 1]]
                x = x / np.sqrt(np.mean(x**2) + config.norm_eps) * scale
                scores = []
                for expert in range(config.num_experts):
                    a, b, bias = of_host(experts.evidence, expert)
                    scores.append(log_softmax(x @ head + x @ a @ b + bias)[tokens[row, t]])
                ratio = np.array(scores) - scores[0]
            sums += ratio
            logits = strength * sums - shift * (np.arange(len(sums)) > 0)
            exp = np.exp(logits - logits.max())
            chosen = np.argsort(-exp, stable=True)[: config.active_experts]
            weights[chosen, row, t] = exp[chosen] / exp.sum()
    return weights


@pytest.mark.parametrize("active", [None, 2])
def test_the_weights_are_those_of_the_equation(active):
    config = BASE.replace(active_experts=active)
    backbone, experts = random_model(config)
    tokens = random_tokens()
    segments = np.ones_like(tokens)
    segments[1, 4:] = 2
    segments[2, 9:] = 0
    allowed = np.ones((BATCH, 4), bool)
    found, _ = evidence_weights(backbone, (experts,), tokens, segments, allowed, config)
    expected = obvious_weights(backbone, experts, tokens, segments, config)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(found)[:, real], expected[:, real], atol=2e-6)
    assert expected[1:, real].max() > 0.5  # the routing is decisive somewhere


def test_the_logits_add_each_experts_own_head():
    backbone, experts = random_model(BASE)
    tokens = random_tokens()
    out = forward(backbone, (experts,), tokens, BASE)
    expected = np.asarray(backbone.logits(out.hidden, BASE), np.float64)
    hidden, weights = np.asarray(out.hidden, np.float64), np.asarray(out.weights, np.float64)
    for expert in range(BASE.num_experts):
        a, b, bias = of_host(experts.head, expert)
        expected += weights[expert][..., None] * (hidden @ a @ b + bias)
    found, _ = run(backbone, (experts,), tokens, BASE)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def poisoned(experts, kept):
    lead = (1, experts.router.bias.shape[1])
    kept = jnp.isin(jnp.arange(lead[1]), jnp.asarray(kept))[None]
    return jax.tree.map(
        lambda x: jnp.where(kept.reshape(lead + (1,) * (x.ndim - 2)), x, jnp.nan), experts
    )


KEEPS = [[0, 2, 3], [0, 1, 3], [0, 2]]


@pytest.mark.parametrize(
    ("evidence", "active"), [(BASE.evidence, None), (BASE.evidence, 2), (None, 2)]
)
def test_a_masked_expert_equals_one_that_was_never_merged_bit_for_bit(active, evidence):
    config = BASE.replace(active_experts=active, evidence=evidence)
    backbone, experts = random_model(config)
    tokens = random_tokens()
    everything = run(backbone, (experts,), tokens, config)[0]
    masked = []
    for kept in KEEPS:
        allowed = mask(kept)
        logits = run(backbone, (experts,), tokens, config, allowed=allowed)[0]
        blind = run(backbone, (poisoned(experts, kept),), tokens, config, allowed=allowed)[0]
        np.testing.assert_array_equal(blind, logits)
        assert np.isfinite(logits).all() and not np.array_equal(logits, everything)
        never = run(
            backbone, (select(experts, kept),), tokens, config.replace(num_experts=len(kept))
        )[0]
        np.testing.assert_array_equal(logits, never)
        masked.append(logits)
    mixed = run(backbone, (experts,), tokens, config, allowed=mask(*KEEPS))[0]
    for row in range(BATCH):
        np.testing.assert_array_equal(mixed[row], masked[row][row])


def test_padding_experts_change_nothing():
    backbone, experts = random_model(BASE)
    tokens = random_tokens()
    expected = run(backbone, (experts,), tokens, BASE)[0]
    allowed = np.pad(np.ones((BATCH, 4), bool), ((0, 0), (0, 2)))
    found = run(backbone, (pad_experts(experts, 6),), tokens, BASE, allowed=allowed)[0]
    np.testing.assert_array_equal(found, expected)


def test_unlike_ranks_merge_with_zero_columns():
    config = BASE.replace(num_experts=3, evidence=None)
    backbone, wide = random_model(config, Ranks(6, 5))
    plain, narrow, full = (select(wide, [i]) for i in range(3))
    plain = with_parts(plain, head=None, evidence=None)
    narrow = with_parts(random_model(config.replace(num_experts=1), Ranks(2, 4), seed=1)[1])
    joined = join(plain, narrow, full)
    assert joined.ranks == Ranks(RANK_BLOCK, RANK_BLOCK)
    tokens = random_tokens()
    expected, weights = run(backbone, (joined,), tokens, config)
    found, _ = run(backbone, (plain, narrow, full), tokens, config)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (np.asarray(joined.head.b[0, 0]) == 0).all()


@pytest.mark.parametrize("evidence", [BASE.evidence, None])
@pytest.mark.parametrize("ranks", [(16, 64), (20, 150)])
def test_another_experts_rank_changes_no_bit(ranks, evidence):
    """Padding to the widest head is not seen in what the others add, or in their evidence."""
    config = BASE.replace(num_experts=2, evidence=evidence)
    backbone, _ = random_model(config)
    public, narrow, wide = (
        random_model(config.replace(num_experts=1), Ranks(rank, rank), seed=seed)[1]
        for seed, rank in enumerate((ranks[0], *ranks))
    )
    tokens = random_tokens()
    expected = run(backbone, (join(public, narrow),), tokens, config)[0]
    joined, more = join(public, narrow, wide), config.replace(num_experts=3)
    allowed = np.tile([True, True, False], (BATCH, 1))
    found = run(backbone, (joined,), tokens, more, allowed=allowed)[0]
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(run(backbone, (joined,), tokens, more)[0], expected)


def some_batch():
    tokens = random_tokens(shape=(BATCH, LENGTH + 1))
    return Batch.of(tokens, np.ones_like(tokens))


@pytest.mark.parametrize("evidence", [BASE.evidence, None], ids=["evidence", "rows"])
def test_the_loss_and_its_gradient_are_those_of_the_logits(evidence):
    config = BASE.replace(evidence=evidence)
    backbone, experts = random_model(config)
    batch = some_batch()

    def obvious(experts):
        out = forward(backbone, (experts,), batch.tokens, config)
        logits = output_logits(backbone, (experts,), out.hidden, out.weights, config)
        nats = jax.nn.logsumexp(logits, -1)
        z = jnp.sum(batch.weights * nats**2)
        nats -= jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
        return jnp.sum(batch.weights * nats) + 1e-3 * z

    def fast(experts):
        return language_model_loss(backbone, (experts,), batch, config, 1e-3)[0]

    expected, found = (jax.jit(jax.value_and_grad(f))(experts) for f in (obvious, fast))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-7)


def test_the_evidence_head_learns_its_bigrams_and_nothing_flows_into_the_backbone():
    config = BASE.replace(num_experts=1, evidence=None)
    backbone, public = random_model(config)
    batch = some_batch()
    with_evidence = jax.grad(lambda w: AnchorLoss(config, 0.0)(w, None, batch)[0])
    both = with_evidence(Anchor(backbone, public))
    without = with_evidence(Anchor(backbone, with_parts(public, evidence=None)))
    for one, other in zip(*map(jax.tree.leaves, (both.backbone, without.backbone)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert float(jnp.abs(both.public.evidence.b[...]).max()) > 0

    own = OwnParts.of(public)
    loss = ExpertAloneLoss(config, 0.0)
    _, metrics = loss(own, (Anchor(backbone, public), public.router), batch)
    hidden = backbone.norm(backbone.embed[...][batch.tokens], config.norm_eps)
    logits = backbone.logits(hidden, config)
    logits = public.evidence.add(logits, hidden, jnp.ones((1, *batch.tokens.shape)))
    nats = jax.nn.logsumexp(logits, -1)
    nats -= jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(metrics["evidence_loss"], jnp.sum(batch.weights * nats), rtol=1e-5)


def test_decoding_carries_the_evidence_from_token_to_token():
    config = BASE.replace(active_experts=2, evidence=(0.9, 2.0, 0.1))
    backbone, experts = random_model(config)
    model = FlexOlmo(backbone, experts, config, tuple("abcd"), None)
    prompts = [[1, 2, 3], [4], list(range(5, 25))]
    generated = model.generate(prompts, 12, without=["c"])
    whole = [[*prompt, *new] for prompt, new in zip(prompts, generated, strict=True)]
    longest = max(map(len, whole))
    rows = [row + [0] * (longest - len(row)) for row in whole]  # padding comes later: unseen
    choices = np.asarray(model.logits(rows, without=["c"])).argmax(axis=-1)
    for row, prompt, new in zip(choices, prompts, generated, strict=True):
        assert row[len(prompt) - 1 :][: len(new)].tolist() == new
    assert len({tuple(new) for new in generated}) == 3
