"""A study from its config to its report: what is chosen, scored, stored, and run again."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from flexolmo_jax.commands.main import INTERRUPTED, main
from flexolmo_jax.config import CONFIGS, load_config
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.model import load
from flexolmo_jax.modeling.experts import with_parts
from flexolmo_jax.modeling.heads import delta
from flexolmo_jax.modeling.transformer import forward
from flexolmo_jax.storage.tensors import leaf_name
from flexolmo_jax.studies import expert_parts, reproduction
from flexolmo_jax.studies.baselines import datasets, models, scores
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.rates import choose_rates
from flexolmo_jax.studies.baselines.results import AFTER, Results
from flexolmo_jax.studies.baselines.seed_stages import plan_seed
from flexolmo_jax.studies.baselines.shared_stages import plan_shared
from flexolmo_jax.studies.engine.commands import PACKAGE
from flexolmo_jax.studies.engine.stages import run_stages
from flexolmo_jax.studies.expert_parts import PARTS, PartsTrial
from flexolmo_jax.studies.expert_training import Recipe, Trial

# The plan


def digests(config, root):
    shared = plan_shared(config, root)
    plan = plan_seed(config, shared, 0)
    return {s.name: s.digest for s in [*shared.stages, *plan.stages]}


def changed(config, root, **changes):
    """Names of the stages that a changed value runs again."""
    before, after = digests(config, root), digests(dataclasses.replace(config, **changes), root)
    return {name for name in after if after[name] != before.get(name)}


def test_a_changed_value_touches_only_what_depends_on_it(chosen, tmp_path):
    config = chosen
    found = changed(config, tmp_path, dense_rates=((5e-3, 5e-3),))
    assert {"seed0/dense/math", "seed0/btx", "seed0/scores/soup_uniform"} <= found
    assert not {"seed0/anchor", "seed0/expert/math", "seed0/scores/flexolmo_topall"} & found
    found = changed(config, tmp_path, decays=(0.5,))
    assert found == set()  # arithmetic on scores that are there
    found = changed(config, tmp_path, active=(1, 2))
    assert {"seed0/choice/flexolmo", "seed0/scores/paper_top2"} <= found
    assert not any(name.startswith(("seed0/expert", "seed0/paper/")) for name in found)
    found = changed(config, tmp_path, evidence_shifts=(2.0,))
    assert {"seed0/choice/evidence", "seed0/scores/evidence_top1"} <= found
    assert not any(name.startswith(("seed0/headed", "seed0/scores/headed_")) for name in found)


def test_another_owner_leaves_the_others_trainings_alone(chosen, texts, tmp_path):
    first = dataclasses.replace(chosen, texts="corpus")
    found = changed(first, tmp_path, owners=("math", "code", "creative"))
    assert {"seed0/expert/creative", "sequences", "pool", "prompts"} <= found
    assert not {"seed0/anchor", "seed0/expert/math", "seed0/dense/code", "texts/math"} & found


def test_names_of_stages_differ(chosen, tmp_path):
    config = chosen
    shared = plan_shared(config, tmp_path)
    names = [s.name for s in [*shared.stages, *plan_seed(config, shared, 0).stages]]
    assert len(set(names)) == len(names)
    order = {
        s.name: i for i, s in enumerate([*shared.stages, *plan_seed(config, shared, 0).stages])
    }
    for stage in plan_seed(config, shared, 0).stages:
        assert all(order[need.name] < order[stage.name] for need in stage.needs)


# The whole


@pytest.fixture(scope="module")
def studied(config_file, tmp_path_factory):
    """Interrupted, resumed, and a second seed later: the folder, and the first report."""
    out = tmp_path_factory.mktemp("study") / "out"
    command = ["study", str(config_file), "--out", str(out)]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexolmo_jax.studies.baselines.training_stages.train_jointly", interrupt)
        assert main(command) == INTERRUPTED
    assert not (out / "report.md").exists()
    done = {file: file.stat().st_mtime for file in out.rglob("done.json")}
    assert main([*command, "--resume"]) == 0
    assert done and all(file.stat().st_mtime == time for file, time in done.items())
    first = json.loads((out / "report.json").read_text())
    assert main([*command, "--seeds", "1", "--resume"]) == 0
    return out, first


def test_the_report_holds_every_method_and_both_seeds(studied, config):
    out, first = studied
    report = json.loads((out / "report.json").read_text())
    assert first["seeds"] == [0] and report["seeds"] == [0, 1]
    bits = report["bits_per_byte"]
    assert {
        "anchor", "dense.math", "expert.code", "soup_uniform", "soup_weighted", "prompt_routing",
        "btm_prefix_top1", "btm_running_top2", "btm_decay_top2", "btx_uniform", "btx_logistic",
        "btx_best", "paper_top1", "paper_topall", "paper_tuned", "paper_plain", "flexolmo",
        "flexolmo_tuned", "flexolmo_uncoordinated", "flexolmo_without_bias",
        "flexolmo_bias_folded", "unrestricted_1x", "without.math", "oracle",
        "evidence", "evidence_top1", "evidence_without.math", "headed_alone.code", "headed.code",
        "headed_rows", "btx_evidence", "btm_headed_decay_top2", "told_headed", "best_token",
    } <= bits.keys()  # fmt: skip
    for column in (*config.domains, "mixed", AFTER):
        value = bits["flexolmo"][column]
        assert value["low"] <= value["mean"] <= value["high"] and len(value["seeds"]) == 2
        assert value["seeds"][0] == first["bits_per_byte"]["flexolmo"][column]["seeds"][0]
    for figure in ("methods", "removal", "removal_evidence", "routing", "owners", "top_k"):
        assert (out / f"{figure}.png").stat().st_size > 5000
    assert (out / "routing_evidence.png").stat().st_size > 5000
    page = (out / "report.md").read_text()
    assert "FlexOlmo, routed as chosen" in page and page.count("| without math |") == 2
    assert "FlexOlmo + heads, routed by evidence" in page
    costs = report["costs"]
    assert costs["flexolmo"]["flops"] < costs["evidence"]["flops"]
    assert costs["btm_decay_top2"]["parameters"] == 3 * costs["anchor"]["parameters"]


def test_rates_are_chosen_on_the_tuning_split_and_the_chosen_are_not_trained_again(studied, config):
    out, first = studied
    choice = first["rates"]["dense"]
    assert [one["rates"] for one in choice["tried"]] == [[1e-3, 1e-3], [3e-3, 3e-3]]
    best = min(choice["tried"], key=lambda one: one["tune"])
    assert choice["chosen"] == best["rates"] and set(first["rates"]) == {"dense"}
    assert first["config"]["dense_rates"] == [best["rates"]]
    trained = [json.loads(file.read_text()) for file in out.glob("seed0/dense/*/done.json")]
    assert sorted(one["name"] for one in trained) == [
        "seed0/dense/code", "seed0/dense/code", "seed0/dense/math"
    ]  # fmt: skip
    tuned = {
        one["made_from"]["training"]["optimizer"]["learning_rate"]: file
        for file, one in zip(out.glob("seed0/dense/*/package"), trained, strict=True)
        if one["name"] == "seed0/dense/code"
    }
    shared = plan_shared(config, out)
    sequences = datasets.read_sequences(shared.sequences.folder / "sequences.npz")["tune.code"]
    for one in choice["tried"]:
        nats = scores.token_nats(load(tuned[one["rates"][0]]), sequences)
        assert one["tune"] == pytest.approx(scores.bits_per_byte(nats, sequences.sizes))


def test_a_heads_anchor_is_the_anchor_that_has_none(studied, config, chosen, tmp_path):
    """One anchor serves all methods: an evidence head changes nothing else in it."""
    out, _ = studied
    with_head = read_anchor(
        plan_seed(chosen, plan_shared(config, out), 0).stages[0].folder / PACKAGE
    )
    plain = dataclasses.replace(chosen, head_rank=0, evidence_rank=0)
    shared = plan_shared(plain, out)
    stage = plan_seed(plain, shared, 0).stages[0]
    run_stages([stage])
    without = read_anchor(stage.folder / PACKAGE)
    public = with_parts(with_head.weights.public, evidence=None)
    found, expected = (with_head.weights.backbone, public), without.weights
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_heads_need_both_ranks_and_adamw_one_rate(config):
    with pytest.raises(ValueError, match="must both be 0 or both above 0"):
        dataclasses.replace(config, head_rank=0)
    with pytest.raises(ValueError, match="dense_rates: AdamW has one rate for all weights"):
        dataclasses.replace(config, dense_rates=((1e-3, 2e-3),))
    with pytest.raises(ValueError, match="rate_owners must be some of the owners, found"):
        dataclasses.replace(config, rate_owners=("news",))
    with pytest.raises(ValueError, match="set head_rank of the study"):
        expert = dataclasses.replace(config.expert, head_rank=4)
        dataclasses.replace(config, expert=expert)


def test_switching_off_the_only_other_leaves_the_owners_pair(studied):
    out, _ = studied
    bits = json.loads((out / "report.json").read_text())["bits_per_byte"]
    # Without code, all that is left of the merge is math's own pair, but for the memory.
    pair, rest = bits["expert.math"]["math"]["mean"], bits["without.code"]["math"]["mean"]
    assert rest == pytest.approx(pair, rel=0.02)


def test_results_are_those_of_the_scores(studied, config):
    out, _ = studied
    shared = plan_shared(config, out)
    config = choose_rates(config, shared).config
    plan = plan_seed(config, shared, 0)
    results = Results(config, shared, {0: plan})
    found = scores.load_scores(plan.scored["anchor"].folder / "scores.npz")["heldout.code"]
    expected = scores.bits_per_byte(found, results.sequences["heldout.code"].sizes)
    assert results.value("anchor", "code").mean == pytest.approx(expected)
    assert results.value("anchor", "code", minus="anchor").seeds == (0.0,)
    one = results.value("anchor", "code", minus="dense.code")
    assert one.mean == pytest.approx(expected - results.value("dense.code", "code").mean)
    both = results.value("anchor", "code", "math").mean
    assert both == pytest.approx((expected + results.value("anchor", "math").mean) / 2)
    told = results.value("told_headed", "code", minus="headed_alone.code")
    assert told.seeds == (0.0,)
    assert (
        results.value("best_token", "code").mean < results.value("headed_alone.code", "code").mean
    )


def test_the_reproduction_shows_evidence_routing_beside_every_method(studied, config, tmp_path):
    out, _ = studied
    shutil.copy(out / "report.json", tmp_path)
    (tmp_path / "tasks.json").write_text("{}")
    report = reproduction.Report(tmp_path)
    page = "\n".join(reproduction.evidence(report))
    bits = report.bits
    for column, other in itertools.product(
        ("public", "mixed"), ("btm_decay_top2", "prompt_routing")
    ):
        [row] = [x for x in page.splitlines() if x.startswith(f"| {reproduction.AGAINST[other]} |")]
        seeds = zip(bits["evidence"][column]["seeds"], bits[other][column]["seeds"], strict=True)
        by_seed = ", ".join(f"{ours - theirs:+.3f}" for ours, theirs in seeds)
        assert f"{bits[other][column]['mean']:.3f} ({by_seed})" in row
        assert f"{report.all['costs'][other]['flops'] / 1e6:.1f}M" in row
    assert all(f"| {owner} |" in page for owner in config.owners)


def test_experts_are_trained_with_another_optimizer_from_a_studys_anchor(studied, config, tmp_path):
    out, _ = studied
    trial = Trial(config, out, tmp_path)
    bits = {}
    for optimizer in ("AdamW", "Muon"):
        model = trial.train(Recipe("expert", optimizer, 1e-2), "math")
        bits[optimizer] = trial.bits(model, "math", ("public",))
    assert bits["AdamW"] != bits["Muon"]
    with pytest.raises(ValueError, match="no anchor of seed 0"):
        Trial(config, tmp_path / "nothing", tmp_path)


def test_only_the_named_parts_of_a_model_are_trained(studied, config, tmp_path, monkeypatch):
    out, _ = studied
    trial = PartsTrial(config, out, tmp_path)
    monkeypatch.setattr(expert_parts, "OWNERS", ("math",))
    monkeypatch.setattr(expert_parts, "TRAINED", (("networks", "gains"), tuple(PARTS)))
    monkeypatch.setattr(expert_parts, "HEAD_RANKS", (2,))
    monkeypatch.setattr(expert_parts, "EVIDENCE_RANKS", (2,))
    monkeypatch.setattr(expert_parts, "WIDTHS", (16,))
    found = expert_parts.measure(trial)
    before, after = (
        {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
        for package in (trial.anchor, tmp_path / "networks_gains_math" / PACKAGE)
        for weights in [read_anchor(package).weights]
    )
    moved = {name for name, leaf in after.items() if not np.array_equal(leaf, before[name])}
    assert moved == {
        name for name in after if name.endswith(PARTS["networks"] + PARTS["gains"])
    }  # fmt: skip
    page = "\n".join(expert_parts.make_page(found, config))
    whole = sum(leaf.size for name, leaf in after.items() if ".router." not in name)
    assert f"| networks + head + gains + attention + embedding | {whole:,} |" in page
    assert "| 16 | " in page and f"{found.narrowed[16].mixed:.3f} |" in page
    assert page.count("(100%)") == 1 and f"{found.evidence[2].mixed:.3f} |" in page


def test_mixed_probabilities_are_those_of_each_experts_head(studied, config, tmp_path):
    out, _ = studied
    trial = PartsTrial(config, out, tmp_path)
    model, sequences = trial.merged(), trial.sequences["tune.math"]
    tokens = sequences.tokens
    run = forward(model.backbone, (model.experts,), tokens[:, :-1], model.config)
    public = np.asarray(model.backbone.logits(run.hidden, model.config), np.float64)
    total = 0.0
    for number, head in enumerate(zip(*model.experts.head.experts(), strict=True)):
        logits = public + np.asarray(delta(run.hidden, *head), np.float64)
        weight = np.asarray(run.weights[number] / run.weights.sum(axis=0))
        chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        total += weight * np.exp(chosen - np.logaddexp.reduce(logits, axis=-1))
    expected = np.where(sequences.sizes > 0, -np.log(total), 0.0)
    found = expert_parts.nats_of_mixed_probabilities(model, sequences)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_study_that_is_done_is_not_made_again(studied, config_file, flexolmo):
    out, _ = studied
    times = {file: file.stat().st_mtime for file in out.rglob("done.json")}
    code, _, error = flexolmo("study", config_file, "--out", out, "--resume")
    assert code == 0, error
    assert times == {file: file.stat().st_mtime for file in out.rglob("done.json")}


def test_a_wrong_study_is_refused(refused, studied, config_file, tmp_path):
    out, _ = studied
    assert "a study already exists here; pass --resume" in refused(
        "study", config_file, "--out", out
    )
    new = ("--out", tmp_path / "new")
    assert "owners must be at least two" in refused("study", config_file, *new, "--owners", "math")
    assert "ci, full, paper" in refused("study", "nothing", *new)
    (tmp_path / "texts").mkdir()
    missing = refused("study", config_file, *new, "--texts", tmp_path / "texts")
    assert "public/train.jsonl: missing" in missing and "--texts FOLDER" in missing
    assert "seeds must differ" in refused("study", config_file, *new, "--seeds", 1, 1)
    assert "expected `config` to be StudyConfig" in refused(
        "study", CONFIGS / "demo_anchor.py", *new
    )
    wrong = ("--anchor.data.length", "16")
    assert "data.length must be the same" in refused("study", config_file, *new, *wrong)


def test_the_presets_are_studies():
    for name in ("ci", "full", "paper"):
        config = load_config(name, StudyConfig, CONFIGS / "study")
        assert models.unrestricted_steps(config, 2.0) > config.expert.steps
        assert config.has_heads == (name != "paper")
