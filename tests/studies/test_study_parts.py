"""What a study is made of: its sequences, models, scores, costs, and choices."""

import dataclasses

import jax
import numpy as np
import pytest

from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.model import load
from flexolmo_jax.modeling.transformer import forward
from flexolmo_jax.studies.baselines import datasets, models, scores
from flexolmo_jax.studies.baselines.costs import costs, expert_step_flops
from flexolmo_jax.studies.baselines.score_stages import NEAR, active_experts, nearly_best
from flexolmo_jax.training.public_data import public_batch

# Texts and sequences


@pytest.fixture(scope="module")
def sequences(config, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequences")
    folders = {domain: texts / domain for domain in config.domains}
    datasets.write_tokenizer(folders["public"], 512, folder)
    tokenizer = Tokenizer.load(folder / datasets.TOKENIZER)
    datasets.write_sequences(config, folders, tokenizer, folder / "sequences.npz")
    return tokenizer, datasets.read_sequences(folder / "sequences.npz")


def test_a_sequence_is_of_one_document_and_its_bytes_are_counted(sequences, texts, config):
    tokenizer, found = sequences
    one = found["heldout.math"]
    documents = [d.text for d in read_documents(texts / "math" / "heldout.jsonl")]
    assert one.tokens.shape == (config.test_sequences, config.length + 1)
    for number in set(one.document.tolist()):  # none of them has a group
        rows = one.document == number
        assert rows.sum() <= config.document_windows
        ids = [
            i
            for row, size in zip(one.tokens[rows], one.sizes[rows], strict=True)
            for i in row[1:][size > 0]
        ]
        text = tokenizer.decode(ids)
        assert documents[number].startswith(text) and text
        assert one.sizes[rows].sum() == len(text.encode())


def test_mixed_sequences_change_their_domain_in_the_middle(sequences, config):
    _, found = sequences
    mixed = found["heldout.mixed"]
    half = config.length // 2
    assert mixed.tokens.shape == (config.mixed_sequences, config.length + 1)
    starts = {
        domain: {tuple(row[:half]) for row in found[f"heldout.{domain}"].tokens}
        for domain in config.domains
    }
    ends = {
        domain: {tuple(row[1 : half + 2]) for row in found[f"heldout.{domain}"].tokens}
        for domain in config.domains
    }
    seen = set()
    for row in mixed.tokens:
        before = [d for d in config.domains if tuple(row[:half]) in starts[d]]
        after = [d for d in config.domains if tuple(row[half:]) in ends[d]]
        assert len(before) == len(after) == 1 and before != after
        seen.add((*before, *after))
    assert len(seen) == 6


def test_an_owners_text_is_cut_and_documents_keep_their_side(config, tmp_path):
    corpus = dataclasses.replace(config, texts="corpus", owner_bytes=50_000)
    datasets.write_texts(corpus, "code", tmp_path)
    split = {s: list(read_documents(tmp_path / f"{s}.jsonl")) for s in datasets.SPLITS}
    assert 49_000 < sum(len(d.text.encode()) for d in split["train"]) <= 50_000
    groups = [{d.group for d in documents} for documents in split.values()]
    assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]


# Models and scores


def test_a_soup_is_the_weighted_mean_of_all_weights(world):
    one = load(world.anchor)
    other = dataclasses.replace(one, experts=models.average([one, one], [1.0, 1.0]).experts)
    soup = models.average([one, other], [0.25, 0.75])
    gate = one.experts.feed_forward.gate[...]
    np.testing.assert_allclose(soup.experts.feed_forward.gate[...], 1.75 * gate, rtol=1e-6)
    np.testing.assert_allclose(soup.backbone.embed[...], one.backbone.embed[...], rtol=1e-6)


def test_scores_are_the_cross_entropy_of_the_logits(model):
    random = np.random.default_rng(0)
    tokens = random.integers(1, 500, (3, 17)).astype(np.int32)
    sizes = np.ones((3, 16), np.int32)
    sizes[2, 9:] = 0
    one = datasets.Sequences(tokens, sizes, np.arange(3))
    nats = scores.token_nats(model, one, without=("loud",))
    logits = np.asarray(model.logits(tokens[:, :-1], without=("loud",)), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0] * (sizes > 0)
    np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-5)
    assert scores.bits_per_byte(nats, sizes) == pytest.approx(expected.sum() / np.log(2) / 41)


@pytest.mark.parametrize("memory", [None, (0.8, 0.3)])
def test_routing_shares_are_the_mean_weights(model, memory):
    routed = models.routed(model, active=2, memory=memory)
    tokens = np.random.default_rng(1).integers(1, 500, (2, 9)).astype(np.int32)
    one = datasets.Sequences(tokens, np.ones((2, 8), np.int32), np.arange(2))
    shares = scores.routing_shares(routed, one)
    assert shares.shape == (2, 4)  # layers, experts
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-5)
    everywhere = models.routed(model, active=None, memory=memory)
    whole = scores.routing_shares(everywhere, one)
    assert (whole > 0).all() and not np.allclose(shares, whole)


def test_a_bias_is_folded_into_the_row(world, make_expert, tmp_path):
    """The logits of public text are about what they were with the bias."""
    packages = [make_expert(tmp_path / "shy", "shy", bias=-1.5), world.experts["math"]]
    model = load(models.merged(world.anchor, packages, tmp_path))
    folded = models.bias_folded(model, world.anchor)
    assert not folded.experts.router.bias[...].any()
    text = public_batch(read_anchor(world.anchor).public_text, model.tokenizer, 64, 64)

    def logits(model):
        """Of the expert that had the bias, in the first layer: the others read what it changes."""
        out = forward(
            model.backbone, (model.experts,), text.tokens, model.config, segments=text.segments
        )
        return np.asarray(out.router_logits)[0, 1][np.asarray(text.segments) > 0]

    before, after = logits(model), logits(folded)
    bare = logits(models.without_bias(model))
    assert (after - bare).mean() == pytest.approx(-1.5, abs=0.1)
    assert np.abs(after - before).mean() < 0.5 * np.abs(bare - before).mean()


def test_a_low_rank_head_is_the_nearest_matrix_of_its_rank():
    random = np.random.default_rng(0)
    product = (random.normal(size=(16, 3)) @ random.normal(size=(3, 40))).astype(np.float32)
    head = models.low_rank(jax.numpy.asarray(product), 3)
    hidden = random.normal(size=(5, 16)).astype(np.float32)
    found = head.add(np.zeros((5, 40), np.float32), hidden, np.ones((1, 5), np.float32))
    np.testing.assert_allclose(found, hidden @ product, rtol=1e-4, atol=1e-4)
    lower = models.low_rank(jax.numpy.asarray(product), 2)
    error = product - np.asarray(lower.a[...][0, 0] @ lower.b[...][0, 0])
    third = np.linalg.svd(product, compute_uv=False)[2]
    assert np.linalg.norm(error) == pytest.approx(third, rel=1e-3)


def test_costs_are_those_of_the_matrices(chosen):
    """Counted again, product by product, for a model of one layer and three experts."""
    width, vocabulary, hidden, rank, length = 32, 512, 48, 4, 32
    head = 2 * width * vocabulary
    attention = 4 * 2 * width * width + 4 * width * (length + 1) / 2
    expert = 3 * 2 * width * hidden
    low_rank = 2 * rank * (width + vocabulary)
    active = {"flexolmo": 1, "btx": None, "evidence": 2, "headed_rows": None, "btx_evidence": 2}
    found = costs(chosen, active)
    assert found["anchor"].flops == attention + expert + head
    assert found["btm_decay_top2"].flops == 3 * found["anchor"].flops
    assert found["flexolmo"].flops == found["anchor"].flops
    assert found["headed_rows"].flops == attention + 3 * expert + head + 2 * low_rank
    by_evidence = attention + 2 * expert + head + 2 * low_rank
    assert found["evidence"].flops == by_evidence + head + 3 * low_rank
    assert found["btx_evidence"] == found["evidence"]
    whole = 3 * found["anchor"].flops + 2 * low_rank
    assert found["btm_headed_decay_top2"].flops == whole
    weights = rank * (width + vocabulary) + vocabulary
    plain = found["flexolmo"].parameters
    assert found["evidence"].parameters == plain + 2 * weights + 3 * weights
    # Forward, the gradients of both factors and of the input; then evidence, whose input is fixed.
    of_heads = 3 * low_rank + head + 2 * low_rank + 2 * rank * vocabulary
    without = dataclasses.replace(chosen, head_rank=0, evidence_rank=0)
    assert expert_step_flops(chosen) == expert_step_flops(without) + of_heads


def test_of_options_that_are_equally_good_the_cheapest_is_chosen():
    options = [{"active": k} for k in (None, 1, 2, 4)]
    scores = (2.0, 2.0 + 2 * NEAR, 2.0 + NEAR, 2.0 - NEAR / 4)
    tried = [{**o, "tune": score} for o, score in zip(options, scores, strict=True)]
    assert nearly_best(tried, options, active_experts) == {"active": 4}
    assert nearly_best(tried[:3], options[:3], active_experts) == {"active": 2}
    assert nearly_best(tried[:1], options[:1], active_experts) == {"active": None}
