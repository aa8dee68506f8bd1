"""Experts with heads of their own, from training to a merged model and out of it again."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from flexolmo_jax.audits.removal import audit_removal
from flexolmo_jax.config import EVIDENCE, EvidenceTraining, OptimizerConfig
from flexolmo_jax.evaluation.bits_per_byte import bits_per_byte
from flexolmo_jax.federation.anchor import read_anchor, write_anchor
from flexolmo_jax.federation.merge import add_expert, merge, remove_expert
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.model import load
from flexolmo_jax.modeling.experts import NO_HEADS, with_parts
from flexolmo_jax.modeling.heads import RANK_BLOCK
from flexolmo_jax.training.stages.evidence import train_evidence
from flexolmo_jax.training.stages.expert import train_expert

TOKENS = np.arange(60).reshape(3, 20)


@pytest.fixture(scope="module")
def owners(world, tmp_path_factory):
    """A folder of an anchor with a public evidence head, and of three experts: one has no heads."""
    folder = tmp_path_factory.mktemp("heads")
    data = {name: str(path) for name, path in world.texts.items()}
    anchor = world.anchor_with_evidence(folder / "anchor", 4)
    ranks = {"math": (6, 4), "code": (2, 3), "plain": (0, 0)}
    for name, (head, evidence) in ranks.items():
        train_expert(
            world.config("alone", head_rank=head, evidence_rank=evidence), anchor=anchor,
            data=data.get(name, data["math"]), name=name, out=folder / name,
            run=folder / f"{name}.run",
        )  # fmt: skip
    merge(anchor, [folder / "math", folder / "code"], folder / "merged")
    return folder


@pytest.fixture
def merged(owners, tmp_path):
    """A merged model of the test's own."""
    shutil.copytree(owners, tmp_path / "heads", ignore=shutil.ignore_patterns("*.run"))
    return tmp_path / "heads" / "merged"


def test_heads_are_trained_packed_and_routed_by(owners, world):
    model = load(owners / "merged")
    assert model.config.evidence == EVIDENCE and model.config.memory is None
    assert model.experts.ranks == (RANK_BLOCK, RANK_BLOCK)
    for part in (model.experts.head, model.experts.evidence):
        assert [float(np.abs(x).max()) > 0 for x in np.asarray(part.b[0])][1:] == [True, True]
    assert not np.asarray(model.experts.head.b[0, 0]).any()  # the public expert has none
    assert not np.asarray(model.experts.head.b[0, 2, 2:]).any()  # the rank is 2: zero columns
    rows = [json.loads(line) for line in (owners / "math.run/metrics.jsonl").open()]
    assert rows[-1]["evidence_loss"] < rows[0]["evidence_loss"]
    score = bits_per_byte(model, str(world.texts["math"]), heldout=0.1)
    without = bits_per_byte(model, str(world.texts["math"]), heldout=0.1, without=["math", "code"])
    anchor = bits_per_byte(load(owners / "anchor"), str(world.texts["math"]), heldout=0.1)
    assert without == anchor and score.bits_per_byte != anchor.bits_per_byte
    assert len(model.generate(["The"], 8)[0]) > 0


def test_the_public_head_is_no_part_of_the_anchors_identity(owners, tmp_path):
    anchor = read_anchor(owners / "anchor")
    bare = anchor.weights._replace(public=with_parts(anchor.weights.public, evidence=None))
    facts = {"licence": "CC0-1.0"}
    write_anchor(tmp_path / "bare", bare, anchor.config, anchor.tokenizer, [], facts)
    assert read_anchor(tmp_path / "bare").identity == anchor.identity
    assert read_anchor(tmp_path / "bare").weights.public.ranks == NO_HEADS


def test_an_anchor_that_exists_gets_a_public_head(world, flexolmo, tmp_path):
    out = tmp_path / "anchor"
    code, printed, error = flexolmo(
        "train", "evidence", "demo_evidence", "--data", world.texts["public"], "--anchor",
        world.anchor, "--out", out, "--steps", "30", "--evidence-rank", "4", "--data.length", "32",
    )  # fmt: skip
    assert code == 0, error
    before, after = read_anchor(world.anchor), read_anchor(out)
    assert after.identity == before.identity and after.weights.public.ranks == (0, 4)
    assert np.abs(after.weights.public.evidence.b[...]).max() > 0
    np.testing.assert_array_equal(load(out).logits(TOKENS), load(world.anchor).logits(TOKENS))
    rows = [json.loads(line) for line in (tmp_path / "anchor.run/metrics.jsonl").open()]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_public_head_of_the_same_rank_is_trained_on(world, owners, tmp_path):
    out = tmp_path / "anchor"
    anchor, like = owners / "anchor", world.config("alone")
    config = EvidenceTraining(
        data=like.data, optimizer=OptimizerConfig(learning_rate=1e-6), steps=1,
        evidence_rank=read_anchor(anchor).weights.public.ranks.evidence,
    )  # fmt: skip
    inputs = {"anchor": anchor, "data": str(world.texts["public"]), "out": out}
    other = dataclasses.replace(config, evidence_rank=config.evidence_rank + 1)
    with pytest.raises(ValueError, match="expected an evidence head of rank 5 .* found rank 4"):
        train_evidence(other, **inputs, run=tmp_path / "other.run", begin_as_public=True)
    train_evidence(config, **inputs, run=tmp_path / "anchor.run", begin_as_public=True)
    before, after = (read_anchor(x).weights.public.evidence for x in (owners / "anchor", out))
    assert np.abs(before.b[...]).max() > 1e-3
    np.testing.assert_allclose(after.b[...], before.b[...], atol=1e-4)


def test_a_removed_expert_is_one_that_was_never_merged_bit_for_bit(owners, merged):
    merge(owners / "anchor", [owners / "code"], merged.parent / "smaller")
    expected = load(merged.parent / "smaller").logits(TOKENS)
    off = load(merged).logits(TOKENS, without=["math"])
    np.testing.assert_array_equal(off, expected)
    remove_expert(merged, "math")
    np.testing.assert_array_equal(load(merged).logits(TOKENS), expected)
    add_expert(merged, merged.parent / "math")
    assert load(merged).expert_names == ("public", "code", "math")


def test_the_audit_of_removal_covers_the_heads(merged):
    assert audit_removal(merged, "math", None, TOKENS).nothing_is_left


def test_experts_with_and_without_heads_merge_by_rows(owners, tmp_path):
    with pytest.warns(UserWarning, match="no evidence head in .*plain, so .* by router rows"):
        merge(owners / "anchor", [owners / "plain", owners / "math"], tmp_path / "mixed")
    model = load(tmp_path / "mixed")
    assert model.config.evidence is None and model.config.memory is not None
    assert model.experts.ranks == (RANK_BLOCK, 0)
    assert not np.asarray(model.experts.head.b[0, 1]).any()


def test_what_cannot_be_routed_by_evidence_is_said(owners, merged, refused, tmp_path):
    words = ("merge", "--anchor", owners / "anchor", "--expert", owners / "plain", "--out")
    error = refused(*words, tmp_path / "out", "--evidence", "0.9", "0.5", "1")
    assert "there is none in " in error and "plain" in error and not (tmp_path / "out").exists()
    assert "shift of 0 or more" in refused(
        *words, tmp_path / "out", "--evidence", "0.9", "0.5", "-1"
    )
    error = refused("experts", "add", merged, merged.parent / "plain")
    assert "evidence head" in error
    error = refused(
        "train", "router", "demo_router", "--model", merged, "--data", "corpus:public", "--out",
        tmp_path / "tuned",
    )  # fmt: skip
    assert "routed by evidence" in error


def test_inspect_lists_the_parts_their_ranks_and_how_it_routes(merged, flexolmo):
    width, vocabulary, layers = 32, 512, 2
    rows = {"math": (6, 4), "code": (2, 3)}
    expected = {
        name: {
            "feed_forward": {"parameters": 3 * layers * width * 48},
            "router": {"parameters": layers * (width + 1)},
            **{
                part: {"parameters": rank * (width + vocabulary) + vocabulary, "rank": rank}
                for part, rank in zip(("head", "evidence"), ranks, strict=True)
            },
        }
        for name, ranks in rows.items()
    }
    found = json.loads(flexolmo("inspect", merged, "--json")[1])
    assert found["parts"] == expected
    listed = json.loads(flexolmo("experts", "list", merged, "--json")[1])
    assert {row["name"]: row["parts"] for row in listed} == expected
    printed = shown(flexolmo("inspect", merged)[1])
    assert "evidence routing 0.9 0.5 1.5; active experts: all" in printed
    math = merged.parent / "math"
    assert json.loads(flexolmo("inspect", math, "--json")[1])["parts"] == expected["math"]
    of_anchor = json.loads(flexolmo("inspect", merged.parent / "anchor", "--json")[1])["parts"]
    assert of_anchor["evidence"]["rank"] == 4 and of_anchor["backbone"]["parameters"] > 10_000
    printed = shown(flexolmo("inspect", math)[1])
    assert "head of rank 6: 3,776" in printed and "evidence of rank 4: 2,688" in printed
    assert "evidence, where all others have evidence heads; else router rows" in printed
    printed = shown(flexolmo("inspect", merged.parent / "plain")[1])
    assert "routed by router rows" in printed and "of rank" not in printed


def shown(table: str) -> str:
    """The text of a table, without its lines and the breaks within cells."""
    return " ".join(table.translate({ord(line): " " for line in "│┃┏┓┗┛━┳┻┡╇┩└┘─┴┌┐┬├┤┼"}).split())


def test_inspect_shows_the_routing_and_the_shares(merged, flexolmo):
    code, printed, _ = flexolmo("inspect", merged)
    assert code == 0 and "decay 0.9, strength 0.5, shift 1.5" in printed
    code, printed, _ = flexolmo("inspect", merged, "--json")
    (public, math, coding) = json.loads(printed)["shares"]
    assert len(math["layers"]) == 1
    assert abs(sum(x["mean"] for x in (public, math, coding)) - 1) < 1e-3
    assert read_manifest(merged)["memory"] is None
