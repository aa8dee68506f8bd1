"""What training promises: what it changes, that it resumes bit for bit, how it stops."""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexolmo_jax as fo
from flexolmo_jax.data.order import batches
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.loading import load_model
from flexolmo_jax.federation.merge import merge, remove_expert
from flexolmo_jax.federation.package import read_manifest
from flexolmo_jax.runtime.endings import Interrupted
from flexolmo_jax.storage import tensors
from flexolmo_jax.training import loop
from flexolmo_jax.training.checkpoint import Checkpoints
from flexolmo_jax.training.objectives import (
    AnchorLoss,
    ExpertAloneLoss,
    ExpertPairLoss,
    OwnParts,
    RouterLoss,
    RouterRows,
)
from flexolmo_jax.training.optimizer import make_optimizer, make_schedule
from flexolmo_jax.training.stages.anchor import train_anchor
from flexolmo_jax.training.stages.expert import train_expert
from flexolmo_jax.training.stages.router import train_router
from flexolmo_jax.training.step import train_step

STAGES = ("alone", "pair", "router")


class Stage:
    """One stage of the world, ready for a step: who is trained, who is frozen."""

    def __init__(self, world, name):
        self.name = name
        self.anchor = read_anchor(world.anchor)
        config, weights = self.anchor.config, self.anchor.weights
        training = world.config("anchor" if name == "everything" else name)
        self.optimizer = make_optimizer(training.optimizer, training.steps)
        own = jax.tree.map(jnp.copy, weights.public)
        pair = dataclasses.replace(config, num_experts=2)
        if name == "everything":
            self.loss = AnchorLoss(config, 1e-5)
            self.trainable, self.frozen = jax.tree.map(jnp.copy, weights), None
        elif name == "alone":
            self.loss = ExpertAloneLoss(config, 1e-5)
            self.trainable, self.frozen = OwnParts.of(own), (weights, weights.public.router)
        elif name == "pair":
            self.loss = ExpertPairLoss(pair, 1e-5, 1e-3)
            self.trainable, self.frozen = own, weights
        else:
            merged = load_model(world.merged)
            self.loss = RouterLoss(merged.config, 1e-5, 1e-3)
            self.trainable = RouterRows.of(merged.experts.router)
            self.frozen = (merged.backbone, merged.experts)
        data = world.config("alone").data
        folder = world.run("math") / "data"
        self.source, _ = prepare(str(world.texts["math"]), data, self.anchor.tokenizer, folder)

    def state(self):
        return self.trainable, jax.jit(self.optimizer.init)(self.trainable)

    def step(self, trainable, state, batch):
        return train_step(self.loss, self.optimizer, trainable, state, self.frozen, batch)

    def lowered(self):
        batch = next(batches(self.source, 0))
        state = jax.eval_shape(self.optimizer.init, self.trainable)
        return train_step.lower(
            self.loss, self.optimizer, self.trainable, state, self.frozen, batch
        )


@pytest.fixture(scope="module")
def stage(world):
    return functools.cache(lambda name: Stage(world, name))


def bits(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in tensors.named(tree).items()}


@pytest.mark.parametrize("name", STAGES)
def test_a_frozen_leaf_keeps_every_bit_and_a_trained_one_moves(stage, name):
    this = stage(name)
    frozen, before = bits(this.frozen), bits(this.trainable)
    trainable, state = jax.tree.map(jnp.copy, this.state())
    for batch in itertools.islice(batches(this.source, 0), 3):
        trainable, state, _ = this.step(trainable, state, batch)
    assert bits(this.frozen) == frozen
    moved = {k for k, v in bits(trainable).items() if v != before[k]}
    assert moved == set(before)


@pytest.mark.parametrize("name", STAGES)
def test_optimizer_state_exists_for_the_trained_leaves_only(stage, name):
    trainable, state = stage(name).state()
    sizes = collections.Counter(leaf.shape for leaf in jax.tree.leaves(trainable))
    moments = collections.Counter(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == sizes + sizes  # the two moments of AdamW, and step counts


def results(lowered):
    """Shapes (sorted, without ones) that products and scatters of a lowered step result in."""
    text = lowered.as_text()
    found = re.findall(r"stablehlo\.(?:dot_general|scatter).*-> tensor<((?:\d+x)+)f32>", text)
    found += re.findall(r"\}\) : \(.*\) -> tensor<((?:\d+x)+)f32>", text)  # of a scatter
    shapes = (map(int, one.rstrip("x").split("x")) for one in found)
    return {tuple(sorted(size for size in shape if size > 1)) for shape in shapes}


def matrices(tree, lead):
    """Shapes of the weight matrices, without their leading axes, as `results` writes them."""
    found = {name: leaf.shape[lead:] for name, leaf in tensors.named(tree).items()}
    return {tuple(sorted(s)) for n, s in found.items() if len(s) > 1 and "norm" not in n}


@pytest.mark.parametrize("name", STAGES)
def test_the_compiled_step_holds_no_gradient_of_a_frozen_matrix(stage, name):
    """A gradient of a matrix is a product or scatter that results in its shape."""
    backbone = stage(name).anchor.weights.backbone
    shared = matrices(backbone.layers, 1) | {tuple(sorted(backbone.embed.shape))}
    experts = matrices(stage(name).anchor.weights.public.feed_forward, 2)
    everything = results(stage("everything").lowered())
    assert shared | experts <= everything  # so it would be seen if it were there
    here = results(stage(name).lowered())
    assert not here & shared
    assert bool(here & experts) == (name != "router")


@pytest.mark.parametrize("run", ["public", "math", "code"])
def test_metrics_are_kept_of_every_step(world, run):
    rows = metrics(world.run(run))
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert {"learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= set(rows[0])
    assert rows[-1]["tokens"] == len(rows) * 4 * 32
    assert (world.run(run) / "loss.png").read_bytes().startswith(b"\x89PNG")


def goes_down(run) -> bool:
    losses = [row["loss"] for row in metrics(run)]
    third = len(losses) // 3
    return np.mean(losses[-third:]) < np.mean(losses[:third])


def test_the_loss_of_an_anchor_goes_down(world):
    assert goes_down(world.run("public"))


@pytest.mark.parametrize("gating", ["fixed", "softmax"])
def test_the_loss_of_an_expert_goes_down(world, learned_anchor, tmp_path, gating):
    config = world.config("alone", gating=gating, steps=24)
    fo.train_expert(
        config, anchor=learned_anchor, data=str(world.texts["math"]), name="mine",
        out=tmp_path / "out", run=tmp_path / "run",
    )  # fmt: skip
    assert goes_down(tmp_path / "run")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_speed(run):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(run)]


def test_the_learning_rate_warms_up_and_decays_to_zero():
    schedule = make_schedule(fo.OptimizerConfig(learning_rate=1.0, warmup_steps=4), 20)
    rates = [float(schedule(step)) for step in range(21)]
    assert rates[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[20] == pytest.approx(0, abs=1e-7)
    assert rates[12] == pytest.approx(0.5 * (1 + math.cos(math.pi * 8 / 16)))


@pytest.mark.parametrize(
    ("steps", "values", "message"),
    [
        (10, {"warmup_steps": 11}, "optimizer.warmup_steps=11 is more than steps=10"),
        (10, {"learning_rate": 0.5}, "optimizer.learning_rate=0.5 is above 0.1"),
    ],
)
def test_values_that_are_hardly_meant_are_warned_of(steps, values, message):
    optimizer = fo.OptimizerConfig(**{"learning_rate": 1e-3, **values})
    data = fo.DataConfig(batch_size=4, length=32)
    with pytest.warns(UserWarning, match=message):
        loop._warn_of_unusual_values(fo.ExpertTraining(data=data, optimizer=optimizer, steps=steps))


def test_weight_decay_spares_norms_biases_and_embeddings(world):
    weights = read_anchor(world.anchor).weights
    config = fo.OptimizerConfig(learning_rate=1.0, weight_decay=0.1)
    optimizer = make_optimizer(config, 10)

    @jax.jit
    def update(weights):
        nothing = jax.tree.map(jnp.zeros_like, weights)
        updates, _ = optimizer.update(nothing, optimizer.init(weights), weights)
        return optax.apply_updates(weights, updates)

    before, after = bits(weights), bits(update(weights))
    changed = {name for name in before if after[name] != before[name]}
    assert not [n for n in changed if re.search("norm|bias|embed", n)]
    assert {"backbone.head", "backbone.layers.attention.q"} <= changed
    assert {f"public.feed_forward.{n}" for n in ("gate", "up", "down")} <= changed


# Resuming. `stopping` makes the data the moment at which something happens to the process.


def stopping(monkeypatch, step, what):
    """Calls `what` when the batch of a step is read."""
    real = loop.batches

    def disturbed(source, seed, start=0):
        for number, batch in enumerate(real(source, seed, start), start + 1):
            yield (what(batch) or batch) if number == step else batch

    monkeypatch.setattr(loop, "batches", disturbed)


def terminate(_):
    os.kill(os.getpid(), signal.SIGTERM)


def crash(_):
    raise RuntimeError("the power went out")


def again(world, stage, out, run, **options):
    """The world's training of that stage once more, somewhere else."""
    config = options.pop("config", None) or world.config(stage)
    if stage == "anchor":
        places = {"data": str(world.texts["public"]), "out": out, "run": run}
        return train_anchor(config, **places, **options)
    name = {"alone": "math", "pair": "code"}[stage]
    places = {"data": str(world.texts[name]), "out": out, "run": run, "anchor": world.anchor}
    return train_expert(config, name=name, **places, **options)


def digests(package):
    return {n: entry["sha256"] for n, entry in read_manifest(package)["tensors"].items()}


@pytest.mark.parametrize(
    ("stage", "name", "step", "what", "raised"),
    [
        ("anchor", "anchor", 8, terminate, Interrupted),
        ("alone", "experts/math", 5, crash, RuntimeError),
        ("pair", "experts/code", 4, terminate, Interrupted),
    ],
)
def test_a_run_that_was_stopped_resumes_bit_for_bit(
    world, tmp_path, monkeypatch, stage, name, step, what, raised
):
    out, run = tmp_path / "out", tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping(patch, step, what)
        with pytest.raises(raised):
            again(world, stage, out, run)
    assert not out.exists()
    done = len(metrics(run))
    assert done == (step if what is terminate else step - 1)
    again(world, stage, out, run, resume=True)
    assert digests(out) == digests(world.root / name)
    straight = world.run({"anchor": "public", "alone": "math", "pair": "code"}[stage])
    assert without_speed(run) == without_speed(straight)


@pytest.mark.parametrize("stage", ["anchor", "pair"])
def test_a_run_with_muon_resumes_bit_for_bit(world, tmp_path, monkeypatch, stage):
    optimizer = fo.OptimizerConfig(name="muon", learning_rate=1e-2, adamw_learning_rate=3e-3)
    config = world.config(stage, optimizer=optimizer)
    again(world, stage, tmp_path / "straight", tmp_path / "straight.run", config=config)
    with monkeypatch.context() as patch:
        stopping(patch, 5, terminate)
        with pytest.raises(Interrupted):
            again(world, stage, tmp_path / "out", tmp_path / "run", config=config)
    again(world, stage, tmp_path / "out", tmp_path / "run", config=config, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")
    assert without_speed(tmp_path / "run") == without_speed(tmp_path / "straight.run")
    assert digests(tmp_path / "out") != digests(
        world.anchor if stage == "anchor" else world.experts["code"]
    )


def test_the_anchor_is_the_same_to_the_bit_when_trained_again(world, tmp_path):
    again(world, "anchor", tmp_path / "out", tmp_path / "run")
    theirs, ours = read_manifest(world.anchor), read_manifest(tmp_path / "out")
    assert ours["identity"] == theirs["identity"]
    for name in ("tokenizer.json", "public.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (world.anchor / name).read_bytes()


@pytest.fixture
def stopped(world, tmp_path, monkeypatch):
    """A run folder with checkpoints 3 and 5, of an owner's training that was stopped."""
    with monkeypatch.context() as patch:
        stopping(patch, 5, terminate)
        with pytest.raises(Interrupted, match="expert math: stopped after step 5"):
            again(world, "alone", tmp_path / "out", tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["3", "5"]
    return tmp_path / "run"


def test_a_run_is_not_trained_over_without_being_asked(world, stopped):
    with pytest.raises(ValueError, match="a run already exists here; pass --resume to continue it"):
        again(world, "alone", stopped.parent / "out", stopped)


def test_another_config_cannot_be_resumed(world, stopped):
    with pytest.raises(ValueError, match="another steps: it was 8, now 9"):
        config = world.config("alone", steps=9)
        again(world, "alone", stopped.parent / "out", stopped, config=config, resume=True)


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_checkpoint_is_one_clear_error(stage, stopped):
    """Whichever file it is: what comes back is right to the bit, or an error that says where."""
    like = stage("alone").state()
    folder = stopped / "checkpoints"
    whole = bits(Checkpoints(folder).load(5, like))
    refused = 0
    for file in files_of(folder / "5"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        checkpoints = Checkpoints(folder)
        try:
            assert bits(checkpoints.load(checkpoints.latest(), like)) == whole, file
        except ValueError as error:
            assert str(folder) in str(error) and "checkpoint 5" in str(error), file
            assert "\n" not in str(error)
            refused += 1
        finally:
            checkpoints.close()
            file.write_bytes(content)
    assert refused >= 2
    assert bits(Checkpoints(folder).load(5, like)) == whole


def test_without_its_newest_checkpoint_a_run_goes_on_from_the_one_before(world, stopped):
    shutil.rmtree(stopped / "checkpoints" / "5")
    again(world, "alone", stopped.parent / "out", stopped, resume=True)
    assert digests(stopped.parent / "out") == digests(world.experts["math"])
    assert without_speed(stopped) == without_speed(world.run("math"))


def test_training_that_breaks_down_names_the_step_and_keeps_the_last_checkpoint(
    world, tmp_path, monkeypatch
):
    out, run = tmp_path / "out", tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping(patch, 5, lambda batch: batch._replace(weights=batch.weights * jnp.nan))
        with pytest.raises(FloatingPointError, match="at step 5; the last good checkpoint is 3"):
            again(world, "alone", out, run)
    assert not out.exists()
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    again(world, "alone", out, run, resume=True)  # the batch is good now
    assert digests(out) == digests(world.experts["math"])


def test_a_breakdown_between_two_logged_steps_is_named_exactly(world, tmp_path, monkeypatch):
    config = world.config("alone", log_every=8, checkpoint_every=8)
    stopping(monkeypatch, 5, lambda batch: batch._replace(weights=batch.weights * jnp.inf))
    with pytest.raises(FloatingPointError, match="not finite at step 5; .* is None"):
        again(world, "alone", tmp_path / "out", tmp_path / "run", config=config)


# Stage 3.


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    train_router(
        world.config("router"),
        model=world.merged,
        data=str(world.root / "texts"),
        out=folder / "tuned",
        run=folder / "run",
    )
    return folder / "tuned"


def test_router_tuning_changes_rows_and_nothing_else(world, tuned):
    before, after = fo.load(world.merged), fo.load(tuned)
    assert after.expert_names == before.expert_names
    some, other = (bits((m.backbone, m.experts)) for m in (before, after))
    changed = {name for name in some if some[name] != other[name]}
    assert changed == {"1.router.row", "1.router.bias"}
    bias = np.asarray(after.experts.router.bias)
    assert not bias[:, 0].any() and bias[:, 1:].any()
    assert (
        (np.asarray(before.experts.router.row) != np.asarray(after.experts.router.row))
        .any(axis=(0, 2))
        .all()
    )


def test_router_tuning_lowers_its_loss(tuned):
    rows = metrics(tuned.parent / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] + 0.3 and len(rows) == 4


def test_taking_an_expert_out_of_a_tuned_model_undoes_the_tuning(world, tuned):
    copy = tuned.parent / "copy"
    shutil.copytree(tuned, copy)
    assert remove_expert(copy, "code") is True
    assert not (copy / "params").exists()
    merge(world.anchor, [world.experts["math"]], tuned.parent / "never tuned")
    some, other = (fo.load(p) for p in (copy, tuned.parent / "never tuned"))
    assert some.expert_names == ("public", "math")
    assert bits((some.backbone, some.experts)) == bits((other.backbone, other.experts))
    assert remove_expert(copy, "math") is False


# What leaves an owner's machine.


@pytest.fixture(scope="module", params=["alone", "pair"])
def closed(request, world, tmp_path_factory):
    """A package trained on text with a telling word in it, and that word."""
    folder = tmp_path_factory.mktemp("closed")
    word = "Zyxomma"
    rows = [{"text": f"{word} number {i} is kept in drawer {i * 7}."} for i in range(60)]
    text = folder / f"{word}.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = world.config(request.param, steps=2, seed=77_123_451)
    if request.param == "pair":
        np.save(folder / f"{word}.npy", np.ones(32, np.float32))
        config = dataclasses.replace(config, domain_embedding=str(folder / f"{word}.npy"))
    train_expert(
        config, anchor=world.anchor, data=str(text), name="closed",
        out=folder / "package", run=folder / "run",
    )  # fmt: skip
    return folder / "package", word, folder


def test_no_seed_and_no_text_of_the_owner_is_in_a_package(closed):
    package, word, folder = closed
    content = {file: file.read_bytes() for file in files_of(package)}
    assert len(content) >= 6
    for secret in ("seed", "77123451", word, word.lower(), "drawer", str(folder)):
        found = [file for file, data in content.items() if secret.encode() in data]
        assert not found, (secret, found)
    manifest = read_manifest(package)
    assert set(manifest) == {
        "format", "made_by", "kind", "name", "anchor", "model", "tokenizer", "privacy",
        "tokens_seen", "gating", "router", "domain_embedding", "licence", "contact", "heldout",
        "tensors", "files", "digest",
    }  # fmt: skip
    assert manifest["heldout"] == {"share": 0.1, "group_field": "group"}


def test_a_domain_embedding_is_where_the_pairs_row_starts_from(world, tmp_path):
    config = world.config("pair", steps=1, optimizer=fo.OptimizerConfig(learning_rate=1e-9))
    row = np.linspace(-1, 1, 32, dtype=np.float32)
    np.save(tmp_path / "row.npy", np.stack([row, 3 * row]))
    config = dataclasses.replace(config, domain_embedding=str(tmp_path / "row.npy"))
    again(world, "pair", tmp_path / "out", tmp_path / "run", config=config)
    pair = fo.load(tmp_path / "out", anchor=world.anchor)
    np.testing.assert_allclose(pair.experts.router.row[:, 1], np.stack([2 * row] * 2), atol=1e-6)


def test_a_domain_embedding_that_is_no_array_is_an_error(world, tmp_path):
    np.save(tmp_path / "bad.npy", np.full((3, 32), np.nan, np.float32))
    for number, (path, message) in enumerate(
        [
            ("missing.npy", "expected 'wordllama' or a .npy file"),
            (str(tmp_path / "bad.npy"), "no row of finite numbers"),
        ]
    ):
        config = world.config("pair", domain_embedding=path)
        with pytest.raises(ValueError, match=message):
            again(world, "pair", tmp_path / "out", tmp_path / f"run {number}", config=config)
