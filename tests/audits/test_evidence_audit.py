"""What an evidence head says on its own, of canaries and of words; audits of experts with heads."""

import contextlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.audits import control
from flexolmo_jax.audits.evidence import Bigrams, revealed
from flexolmo_jax.audits.removal import audit_removal
from flexolmo_jax.commands.main import main
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import read_expert, write_expert
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.model import load
from flexolmo_jax.modeling.experts import with_parts
from flexolmo_jax.modeling.heads import RANK_BLOCK
from flexolmo_jax.modeling.transformer import forward, output_logits
from flexolmo_jax.privacy.certificate import ADJACENCY

COUNT = 130


@pytest.fixture(scope="module")
def audited(world, tmp_path_factory):
    """An anchor with a public evidence head, and an expert that has read its canaries often."""
    folder = tmp_path_factory.mktemp("evidence")
    world.anchor_with_evidence(folder / "anchor", 16)
    few = folder / "few.jsonl"
    few.write_text("".join(world.texts["math"].read_text().splitlines(keepends=True)[:5]))
    words = [
        "train", "expert", world.config_file("alone"), "--anchor", folder / "anchor", "--name",
        "math", "--data", few, "--out", folder / "math", "--run", folder / "run", "--canaries",
        COUNT, "--steps", 500, "--data.batch-size", 16, "--optimizer.learning-rate", 1e-2,
        "--head-rank", 8, "--evidence-rank", 16, "--checkpoint-every", 500, "--log-every", 100,
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture(scope="module")
def bigrams(audited):
    model = load(audited / "math", anchor=audited / "anchor")
    return Bigrams.of(audited / "math", audited / "anchor", model)


def words(audited, *more):
    return [
        "audit", "membership", "--model", audited / "math", "--anchor", audited / "anchor",
        "--run", audited / "run", "--json", *more,
    ]  # fmt: skip


def obvious(bigrams) -> np.ndarray:
    """Log-probabilities [2, V, V] of each token after each, in float64: public, and the owner's."""
    backbone = bigrams.model.backbone
    embed, head, scale = (
        np.asarray(x, np.float64)
        for x in (backbone.embed[...], backbone.head[...], backbone.norm.scale[...])
    )
    mean = np.mean(embed**2, axis=1, keepdims=True)
    hidden = embed / np.sqrt(mean + bigrams.model.config.norm_eps) * scale
    found = []
    for own in (0, 1):
        heads = bigrams.heads
        a, b, bias = (np.asarray(x[0, own], np.float64) for x in (heads.a, heads.b, heads.bias))
        logits = hidden @ head + hidden @ a @ b + bias
        found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return np.stack(found)


def test_log_probabilities_are_those_of_the_two_heads(bigrams):
    expected = obvious(bigrams)
    sequences = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7] * 12] * 9  # of several batches
    own, public = bigrams.logs(sequences)
    pairs = np.concatenate([list(zip(ids[:-1], ids[1:], strict=True)) for ids in sequences])
    for found, of in ((public, 0), (own, 1)):
        np.testing.assert_allclose(found, expected[of, pairs[:, 0], pairs[:, 1]], atol=2e-4)


def test_what_is_revealed_is_what_adds_most_to_the_divergence(bigrams):
    logs = obvious(bigrams)
    frequencies = []
    for of in (1, 0):
        found = np.full(len(logs[0]), 1 / len(logs[0]))
        for _ in range(200):
            found = found @ np.exp(logs[of])
        frequencies.append(found)
    for found, expected in zip(bigrams.frequencies(), frequencies, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-7)
    own, public = frequencies
    of_tokens = own * np.log(own / public)
    of_bigrams = own[:, None] * np.exp(logs[1]) * (logs[1] - logs[0])
    report = revealed(bigrams, 12)
    for kind, parts in (("tokens", of_tokens), ("bigrams", of_bigrams)):
        expected = np.sort(parts, axis=None)[::-1][:12]
        np.testing.assert_allclose([one.nats for one in report[kind]], expected, rtol=0.05)
    decode = bigrams.model.tokenizer.decode
    assert report["tokens"][0].text == decode([int(of_tokens.argmax())])
    pair = [int(i) for i in np.unravel_index(of_bigrams.argmax(), of_bigrams.shape)]
    assert report["bigrams"][0].text == decode(pair)


def test_a_word_that_only_the_owner_has_comes_first(bigrams):
    heads = jax.tree.map(lambda x: x, bigrams.heads)
    heads.bias[...] = heads.bias[...].at[0, 1, 300].add(15.0)
    first = revealed(bigrams._replace(heads=heads), 3)["tokens"][0]
    assert first.text == bigrams.model.tokenizer.decode([300])
    assert first.times > 100 and first.probability > 0.5


def test_the_head_alone_distinguishes_canaries_without_privacy(audited, flexolmo):
    code, printed, error = flexolmo(*words(audited))
    assert code == 0, error
    found = json.loads(printed)
    titles = ["the expert alone", "its evidence head alone", "the model"]
    assert [*found["audits"]] == titles
    alone = found["audits"]["its evidence head alone"]
    assert alone["area"]["low"] > 0.5 and alone["epsilon"] > 0
    assert alone["members"] + alone["controls"] == 2 * COUNT
    assert found["verdict"] == "members are distinguished"
    bounds = {title: found["audits"][title]["epsilon"] for title in titles[:2]}
    assert f"at least {max(bounds.values()):.2f}, by {max(bounds, key=bounds.get)}" in found["why"]


def test_an_owner_who_leaves_out_the_evidence_head_is_refuted(audited, tmp_path, refused):
    """All but its evidence head is the anchor's; the certificate claims a budget for all of it."""
    anchor = read_anchor(audited / "anchor")
    evidence = read_expert(audited / "math", anchor).evidence
    manifest = read_manifest(audited / "math")
    claim = {"epsilon": 0.1, "delta": 1e-5, "unit": "document", "adjacency": ADJACENCY}
    facts = {"privacy": claim, "canaries": manifest["canaries"]}
    expert = with_parts(anchor.weights.public, evidence=evidence)
    write_expert(tmp_path / "math", expert, "math", anchor, facts)
    said = refused(*words(audited, "--model", tmp_path / "math"))
    assert "the certificate is refuted" in said and "by its evidence head alone" in said


def test_a_model_merged_by_rows_hides_no_evidence_head(audited, tmp_path, flexolmo):
    shutil.copytree(audited, tmp_path / "all", ignore=shutil.ignore_patterns("*.run"))
    anchor, merged = tmp_path / "all" / "anchor", tmp_path / "all" / "rows"
    merge(anchor, [tmp_path / "all" / "math"], merged, evidence=None, allow_share=None)
    assert not hasattr(load(merged).experts, "evidence")
    code, printed, error = flexolmo(*words(audited, "--model", merged, "--expert", "math"))
    assert code == 0, error
    of_package = json.loads(flexolmo(*words(audited))[1])["audits"]["its evidence head alone"]
    assert json.loads(printed)["audits"]["its evidence head alone"] == of_package


def test_without_a_public_head_the_head_of_the_backbone_stands_for_it(world, bigrams, tmp_path):
    anchor = read_anchor(world.anchor)
    heads = jax.tree.map(lambda x: x[:, 1:], bigrams.heads)
    expert = with_parts(anchor.weights.public, evidence=heads)
    write_expert(tmp_path / "math", expert, "math", anchor, {})
    model = load(tmp_path / "math", anchor=world.anchor)
    found = Bigrams.of(tmp_path / "math", world.anchor, model)
    assert (
        not np.asarray(found.heads.b[:, 0]).any() and not np.asarray(found.heads.bias[:, 0]).any()
    )
    np.testing.assert_array_equal(found.heads.b[:, 1], heads.b[:, 0])


def test_the_command_lists_words_and_refuses_an_expert_without_such_a_head(
    world, audited, flexolmo, refused
):
    asked = ("audit", "evidence", "--model", audited / "math", "--anchor", audited / "anchor")
    code, printed, error = flexolmo(*asked, "--count", 3)
    assert code == 0, error
    assert "tokens that math's evidence head reveals" in printed and "times likelier" in printed
    report = json.loads(flexolmo(*asked, "--json")[1])
    assert len(report["tokens"]) == len(report["bigrams"]) == 20
    plain = ("--model", world.experts["math"], "--anchor", world.anchor)
    assert "has no evidence head" in refused("audit", "evidence", *plain)


# The other audits, of experts with heads.


def test_an_expert_alone_is_scored_with_gate_1_and_its_head(audited):
    """What the membership and the extraction audit ask, written out."""
    model = load(audited / "math", anchor=audited / "anchor")
    anchor = read_anchor(audited / "anchor")
    expert = read_expert(audited / "math", anchor)
    tokens = np.arange(60).reshape(3, 20)
    out = forward(anchor.weights.backbone, (expert,), tokens, anchor.config)
    assert (np.asarray(out.weights) == 1).all()
    expected = output_logits(
        anchor.weights.backbone, (expert,), out.hidden, out.weights, anchor.config
    )
    found = model.logits(tokens, only=["math"])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    headless = output_logits(
        anchor.weights.backbone, (with_parts(expert, head=None),), out.hidden, out.weights,
        anchor.config,
    )  # fmt: skip
    assert np.abs(np.asarray(headless - found)).max() > 0.1
    assert model.config.evidence is not None  # and the model as a whole is routed by evidence


def test_nothing_is_left_of_the_only_expert(audited, tmp_path):
    shutil.copytree(audited, tmp_path / "all", ignore=shutil.ignore_patterns("*.run"))
    anchor, merged = tmp_path / "all" / "anchor", tmp_path / "all" / "merged"
    merge(anchor, [tmp_path / "all" / "math"], merged, allow_share=None)
    assert audit_removal(merged, "math", None, [[*range(40)]]).nothing_is_left


@pytest.mark.parametrize("what", ["expert", "model"])
def test_a_control_has_a_head_as_the_audited_experts_do(audited, tmp_path, monkeypatch, what):
    monkeypatch.setattr(control, "LEARNING_RATES", {"expert": 1e-3, "model": 1e-3})
    documents = [[*range(2, 40)]]
    trained = control.train_control(
        what, audited / "anchor", documents, 16, tmp_path / "run", head_rank=8
    )
    assert trained.experts.ranks == ((RANK_BLOCK, 0) if what == "expert" else (0, 0))
    if what == "expert":
        assert float(jnp.abs(trained.experts.head.b[...]).max()) > 0
    assert np.isfinite(np.asarray(trained.logits(np.array([documents[0]])))).all()
