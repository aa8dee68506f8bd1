"""A study from its config to its report: what is chosen, scored, stored, and run again."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from flexolmo_jax.commands.main import INTERRUPTED, main
from flexolmo_jax.config import CONFIGS, load_config
from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.model import load
from flexolmo_jax.modeling.experts import with_parts
from flexolmo_jax.modeling.transformer import forward
from flexolmo_jax.studies.baselines import datasets, models, scores
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.evidence_stages import NEAR, cautious
from flexolmo_jax.studies.baselines.rates import choose_rates
from flexolmo_jax.studies.baselines.results import AFTER, Results
from flexolmo_jax.studies.baselines.seed_stages import plan_seed
from flexolmo_jax.studies.baselines.shared_stages import plan_shared
from flexolmo_jax.studies.engine.commands import PACKAGE
from flexolmo_jax.studies.engine.stages import run_stages
from flexolmo_jax.studies.expert_training import Recipe, Trial
from flexolmo_jax.training.public_data import public_batch

TINY = """from flexolmo_jax.config import *
from flexolmo_jax.studies.baselines.config import StudyConfig

data = DataConfig(batch_size=4, length=32, heldout=0.0)
optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
sizes = dict(vocab_size=512, width=32, num_layers=1, num_heads=2, ffn_width=48, max_length=32)
model = ModelConfig(**sizes)
config = StudyConfig(
    texts={texts!r},
    owners=("math", "code"),
    anchor=AnchorTraining(model=model, data=data, optimizer=optimizer, steps=8, public_tokens=2048),
    expert=ExpertTraining(data=data, optimizer=optimizer, steps=4, fit_tokens=1024),
    router=RouterTraining(data=data, optimizer=optimizer, steps=2),
    dense_rates=((1e-3, 1e-3), (3e-3, 3e-3)),
    unrestricted_rates=((1e-3, 1e-3),),
    rate_owners=("code",),
    head_rank=4,
    evidence_rank=4,
    unrestricted_flops=(1.0,),
    tune_sequences=4,
    test_sequences=16,
    mixed_sequences=6,
    prefix=8,
    proxies=0.5,
    routers=("logistic",),
    memories=((0.8, 0.3),),
    active=(1,),
    decays=(0.9,),
    evidence_decays=(0.9,),
    evidence_strengths=(0.5, 1.0),
    evidence_shifts=(0.75, 1.5),
    soup_temperatures=(0.1,),
)
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder as `flexolmo data flexmix` writes it."""
    folder = tmp_path_factory.mktemp("texts")
    for domain, count in (("public", 60), ("math", 120), ("code", 30)):
        documents = [
            d.text[:3000] for d in itertools.islice(read_documents(f"corpus:{domain}"), count)
        ]
        (folder / domain).mkdir()
        parts = {"tune": documents[:10], "heldout": documents[10:20], "train": documents[20:]}
        for split, part in parts.items():
            lines = (json.dumps({"text": text}) + "\n" for text in part)
            (folder / domain / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def config_file(texts, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(TINY.format(texts=str(texts)))
    return file


@pytest.fixture(scope="module")
def config(config_file) -> StudyConfig:
    return load_config(config_file, StudyConfig)


@pytest.fixture(scope="module")
def chosen(config) -> StudyConfig:
    """With one rate of each kind, as a seed is planned."""
    return config.with_rates("dense", config.dense_rates[:1])


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


def test_scores_are_the_cross_entropy_of_the_logits(model, quick):
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
def test_routing_shares_are_the_mean_weights(model, quick, memory):
    routed = models.routed(model, active=2, memory=memory)
    tokens = np.random.default_rng(1).integers(1, 500, (2, 9)).astype(np.int32)
    one = datasets.Sequences(tokens, np.ones((2, 8), np.int32), np.arange(2))
    shares = scores.routing_shares(routed, one)
    assert shares.shape == (2, 4)  # layers, experts
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-5)
    everywhere = models.routed(model, active=None, memory=memory)
    whole = scores.routing_shares(everywhere, one)
    assert (whole > 0).all() and not np.allclose(shares, whole)


def test_a_bias_is_folded_into_the_row(world, make_expert, tmp_path, quick):
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
def studied(config_file, tmp_path_factory, quick):
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
    assert "experts with heads, routed by evidence" in page
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


def test_the_largest_shift_near_the_best_is_chosen():
    options = [{"active": 1, "evidence": [0.9, 0.5, shift]} for shift in (0.5, 1.0, 2.0)]
    tried = [{**o, "tune": tune} for o, tune in zip(options, (2.0, 2.0 + NEAR, 2.1), strict=True)]
    assert cautious(tried, options) == options[1]


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
