"""Attackers do what they are said to do, on tiny weights and on real packages."""

import dataclasses

import jax
import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import read_expert
from flexolmo_jax.federation.package import Package, check_packages
from flexolmo_jax.model import load
from flexolmo_jax.modeling.experts import Experts, Ranks
from flexolmo_jax.modeling.heads import delta
from flexolmo_jax.studies.admission import planted
from flexolmo_jax.studies.admission.attackers import (
    ATTACKS,
    BELOW,
    Scene,
    tensors_of,
    with_weights,
    write_attacker,
)
from flexolmo_jax.studies.admission.cohort import HONEST, documents_of, make_cohort
from flexolmo_jax.studies.admission.harm import Merge, compared, harms
from flexolmo_jax.studies.admission.weights import (
    away_from,
    heads_between,
    permuted,
    strongest,
    with_noise,
)
from flexolmo_jax.studies.shares import along_the_mean_input

CONFIG = ModelConfig(vocab_size=40, width=8, num_layers=2, num_heads=2, ffn_width=12, max_length=16)


def random_expert(seed: int, config: ModelConfig = CONFIG) -> Experts:
    """An expert with both heads whose every weight is random, router rows and heads included."""
    expert = Experts(config, 1, jax.random.key(seed), Ranks(4, 4))
    draw = np.random.default_rng(seed)
    values = {
        n: draw.normal(0, 0.05, x.shape).astype(np.float32) for n, x in tensors_of(expert).items()
    }
    return with_weights(expert, values)


def network(weights, x):
    """The feed-forward network of the first layer."""
    gate, up, down = (weights[f"feed_forward.{n}"][0, 0] for n in ("gate", "up", "down"))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def head(weights, part, x):
    return delta(x, *(weights[f"{part}.{n}"][0, 0] for n in ("a", "b", "bias")))


def test_a_permuted_copy_is_the_same_function_of_other_numbers():
    victim = tensors_of(random_expert(0))
    copy, x = permuted(victim, 3), np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_allclose(network(copy, x), network(victim, x), atol=1e-6)
    for part in ("head", "evidence"):
        np.testing.assert_allclose(head(copy, part, x), head(victim, part, x), atol=1e-6)
    for name in ("feed_forward.gate", "feed_forward.down", "head.a", "evidence.b"):
        assert not np.allclose(copy[name], victim[name], atol=1e-3)


def test_heads_are_mixed_by_their_logits_and_the_update_is_flipped():
    one, other = (tensors_of(random_expert(seed)) for seed in (0, 1))
    x = np.random.default_rng(2).normal(size=(5, 8)).astype(np.float32)
    mixed = heads_between(one, other, 0.25, "evidence")
    expected = 0.75 * head(one, "evidence", x) + 0.25 * head(other, "evidence", x)
    np.testing.assert_allclose(head(mixed, "evidence", x), expected, atol=1e-6)
    flipped = away_from(one, other, -1.0)
    middle = (flipped["feed_forward.up"] + one["feed_forward.up"]) / 2
    np.testing.assert_allclose(middle, other["feed_forward.up"], atol=1e-6)


def test_noise_is_a_share_of_each_tensor_and_bisection_stays_below_its_bound():
    weights = tensors_of(random_expert(0))
    noisy = with_noise(weights, 0.5, 0, "feed_forward.gate")
    change = noisy["feed_forward.gate"] - weights["feed_forward.gate"]
    assert change.std() == pytest.approx(0.5 * weights["feed_forward.gate"].std(), rel=0.2)
    assert noisy["feed_forward.up"] is weights["feed_forward.up"]

    def make(strength):
        return {"x": np.float32([strength])}

    found = strongest(make, lambda w: float(w["x"][0]) ** 2, 0.25, 2.0)
    assert 0.48 < float(found["x"][0]) < 0.5
    assert float(strongest(make, lambda _: 0.0, 0.25, 2.0)["x"][0]) == 2.0


def test_the_trigger_stands_before_its_payload_and_only_where_it_is_planted():
    text = "One. Two. Three. Four. Five. Six. Seven. Eight."
    all_of, none = planted.with_backdoor(text, 1.0), planted.with_backdoor(text, 0.0)
    assert none == text
    assert all_of.count(planted.TRIGGER + planted.PAYLOAD.removesuffix(".")) == 8
    some = planted.with_backdoor(text * 40, 0.3)
    assert 0.2 < some.count(planted.TRIGGER) / 281 < 0.4


def test_repeated_documents_are_all_read(tmp_path):
    file = tmp_path / "some.jsonl"
    planted.write_repeated(file, "news/0", 2, 3)
    chosen = [d.text for d in planted.memorized_documents("news/0", 2)]
    read = [d.text for d in read_documents(file)]
    assert [sum(x.startswith(text) for x in read) for text in chosen] == [4, 4]
    planted.write_repeated(file, "news/0", 2, 0)
    assert len(list(read_documents(file))) == 2


def test_halves_of_a_text_share_no_group():
    first, second = ({d.group for d in documents_of(f"math/{half}")} for half in (0, 1))
    assert first and second and not first & second
    assert first | second == {d.group for d in documents_of("math")}


def test_the_cohort_is_large_and_of_many_kinds(world, tmp_path):
    cohort = make_cohort(world.root, tmp_path, owners=("math", "code"))
    assert len(cohort.packages) == len(HONEST) + 2
    assert len(HONEST) + 4 >= 20
    assert sum("--dp-epsilon" in own.words for own in HONEST.values()) >= 2
    made = [own.made for own in HONEST.values() if own.made]
    assert {key for own in made for key in own} == {"rank", "bits", "width"}
    again = make_cohort(world.root, tmp_path, owners=("math", "code"))
    assert [s.folder for s in again.stages] == [s.folder for s in cohort.stages]


@pytest.fixture(scope="module")
def scene(world, tmp_path_factory):
    """Attackers with random experts beside a real anchor that has an evidence head."""
    anchor = read_anchor(world.anchor_with_evidence(tmp_path_factory.mktemp("a") / "anchor", 4))
    names = ("own", "aimed", "backdoor", "rare_backdoor", "memorized", "repeated",
             "public_head", "any_head")  # fmt: skip
    trained = {n: tensors_of(random_expert(i, anchor.config)) for i, n in enumerate(names)}
    like = random_expert(0, anchor.config)
    constant = np.asarray(along_the_mean_input(anchor, like.router).row[...])[:, 0] / 10
    public = anchor.weights.public
    of_public = {n: x for n, x in tensors_of(public).items() if n.startswith("evidence.")}
    quiet = np.full_like(trained["own"]["router.bias"], -3)
    trained["own"] = {**trained["own"], **of_public, "router.bias": quiet}
    victim = tensors_of(random_expert(99, anchor.config))
    return Scene(anchor, tensors_of(public), trained, victim, constant, (public, like))


def test_every_attacker_is_made_and_all_but_the_broken_are_sound_packages(
    scene, world, tmp_path, monkeypatch
):
    from flexolmo_jax.federation.expert import write_expert

    like = tmp_path / "like"
    write_expert(like, scene.stacks[1], "like", scene.anchor, {})
    measured = []
    monkeypatch.setattr(
        Scene,
        "public_share",
        lambda self, w: measured.append(1) or float(abs(w["router.row"]).max()),
    )
    for name, attack in ATTACKS.items():
        used = {one: scene.trained[one] for one in ("own", *attack.uses)}  # the stage needs these
        write_attacker(name, attack, scene._replace(trained=used), like, tmp_path / name)
        package = Package.open(tmp_path / name, "expert")
        assert package.manifest["name"] == name
        if name == "nan":
            with pytest.raises(ValueError, match=r"router\.row.*NaN"):
                check_packages([package])
        else:
            check_packages([package])
    assert measured
    huge = read_expert(tmp_path / "huge", scene.anchor)
    assert float(huge.feed_forward.gate[...].max()) == np.float32(1e9)
    kinds = {attack.kind for attack in ATTACKS.values()}
    assert len(kinds) >= 8
    assert {"mild", "strong", "adaptive"} == {attack.level for attack in ATTACKS.values()}


def test_a_hijacking_row_takes_public_text_and_an_adaptive_one_stays_below(scene):
    strong = ATTACKS["row_strong"].make(scene)
    assert scene.public_share(strong) > 0.9
    honest, below = scene.public_share(scene.own), ATTACKS["row_below"].make(scene)
    assert honest < 0.3 < scene.public_share(below) < BELOW


def test_what_costs_and_what_takes_credit_is_harm():
    before = Merge(
        {"public": 2.0, "math": 1.0},
        {"public": {"math": 0.2}, "math": {"math": 0.8, "public": 0.1}},
    )
    after = Merge(
        {"public": 2.0, "math": 1.05},
        {
            "public": {"math": 0.1},
            "math": {"math": 0.4, "public": 0.1},
            "x": {"math": 0.5, "public": 0.0},
        },
    )
    found = compared("x", before, after)
    assert (found["cost_of"], found["share_of"], found["credit_of"]) == ("math",) * 3
    assert found["cost"] == pytest.approx(0.05)
    assert found["credit"] == pytest.approx(0.5)
    quiet = {"cost": 0.0, "credit": 0.0, "payload": 0.0, "extracted": 0.0}
    assert harms({"rows": {**quiet, **found}}) == ["costs", "takes credit"]
    assert harms({"rows": quiet, "evidence": {**quiet, "payload": 1.0}}) == ["says payload"]
    assert harms({"refused": "a NaN"}) == []
    broken = after._replace(bits={"public": float("nan"), "math": 1.0})
    assert compared("x", before, broken)["cost"] == 10.0


def test_rates_of_a_model_that_knows_nothing_are_zero(world):
    model = load(world.merged)
    documents = planted.memorized_documents("news/0", 1)
    assert planted.payload_rate(model, ["Once"]) == 0
    assert planted.extraction_rate(model, documents, model.tokenizer) == 0
    assert dataclasses.is_dataclass(model)
