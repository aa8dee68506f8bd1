"""Private training of all parts of an expert: one gradient, clipped and noised as a whole."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexolmo_jax.commands.main import main
from flexolmo_jax.data.batches import Batch
from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import read_expert
from flexolmo_jax.federation.package import read_manifest, write_manifest
from flexolmo_jax.modeling.experts import Experts, Ranks, with_parts
from flexolmo_jax.privacy.accounting import Mechanism
from flexolmo_jax.privacy.mechanism import Clipping, clipped_gradients, with_noise
from flexolmo_jax.storage import tensors
from flexolmo_jax.training.objectives import expert_parts
from flexolmo_jax.training.private.steps import private_step
from flexolmo_jax.training.starting_point import initial_expert

U, W, S = 4, 2, 16  # units, windows of each, tokens of a window
HEADS = {"head_rank": 6, "evidence_rank": 4}
TRAINED = {"fixed": ("feed_forward", "head", "evidence")}
TRAINED["softmax"] = (*TRAINED["fixed"], "router")


@pytest.fixture(scope="module", params=TRAINED)
def stage(request, world):
    """Loss, weights and frozen weights of an expert with heads that are not 0, and its parts."""
    anchor = read_anchor(world.anchor)
    config = world.config("alone", gating=request.param, **HEADS)
    expert = initial_expert(config, anchor.config, anchor.weights.public)
    draw = np.random.default_rng(0).standard_normal
    expert = jax.tree.map(lambda x: x + 0.05 * draw(x.shape, np.float32), expert)
    return *expert_parts(config, anchor.config, anchor.weights, expert), TRAINED[request.param]


def units(seed=0) -> Batch:
    """Canaries: units of random tokens, the first of which has one window only."""
    tokens = np.random.default_rng(seed).integers(0, 512, (U, W, S + 1)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[0, 1:] = 0
    batch = Batch.of(tokens, segments)
    return batch._replace(weights=batch.weights / (W * S))


def length(tree) -> float:
    return float(optax.tree.norm(tree))


def of_part(tree, part) -> dict:
    return {n: x for n, x in tensors.named(tree).items() if n.split(".")[0] == part}


@functools.partial(jax.jit, static_argnames=("loss", "norm"))
def clipped(loss, norm, trainable, frozen, batch):
    is_empty = ~jnp.any(batch.weights > 0, axis=(1, 2))
    return clipped_gradients(loss, Clipping(norm, 2), trainable, frozen, batch, is_empty)[0]


def alone(batch, unit) -> Batch:
    """The batch with one unit; the others are empty."""
    kept = jnp.arange(U)[:, None, None] == unit
    return jax.tree.map(lambda x: jnp.where(kept, x, 0), batch)


def gradient(loss, trainable, frozen, unit):
    return jax.jit(jax.grad(lambda t: loss(t, frozen, unit)[0]))(trainable)


@pytest.mark.parametrize("norm", [0.01, 0.3])
def test_the_gradient_of_all_parts_together_is_at_most_the_clip_norm(stage, norm):
    loss, trainable, frozen, parts = stage
    for unit in range(U):
        found = clipped(loss, norm, trainable, frozen, alone(units(), unit))
        assert length(found) == pytest.approx(1, abs=1e-5)  # a unit's share, over the clip norm
        assert sum(length(of_part(found, part)) ** 2 for part in parts) == pytest.approx(1)
        assert all(length(of_part(found, part)) > 0 for part in parts)


def test_a_canarys_gradient_of_a_head_is_scaled_by_the_norm_of_all_parts(stage):
    """Not by its own norm: that would be two mechanisms, and the ledger has one."""
    loss, trainable, frozen, _ = stage
    canary = jax.tree.map(lambda x: x[1], units())
    whole = gradient(loss, trainable, frozen, canary)
    found = clipped(loss, 0.01, trainable, frozen, alone(units(), 1))
    for part in ("head", "evidence"):
        for name, value in of_part(found, part).items():
            expected = np.asarray(of_part(whole, part)[name]) / length(whole)
            assert np.abs(expected).max() > 0, name
            np.testing.assert_allclose(value, expected, atol=1e-4 * np.abs(expected).max())


def test_without_clipping_and_noise_it_is_the_plain_gradient(stage):
    loss, trainable, frozen, _ = stage
    huge = 1e4
    found = with_noise(clipped(loss, huge, trainable, frozen, units()), 0.0, jax.random.key(0))
    whole = jax.tree.map(lambda x: x.reshape(U * W, *x.shape[2:]), units())
    expected = tensors.named(gradient(loss, trainable, frozen, whole))
    for name, value in tensors.named(found).items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            huge * value, expected[name], atol=1e-4 * scale, rtol=1e-3, err_msg=name
        )


def test_every_weight_of_every_part_gets_the_same_noise(stage):
    loss, trainable, frozen, parts = stage
    run = Mechanism(100, 4, U, 10, noise_multiplier=2.0)
    optimizer = optax.sgd(1.0)
    nothing = jax.tree.map(jnp.zeros_like, units())
    after, state = jax.tree.map(jnp.copy, trainable), optimizer.init(trainable)
    for key in range(3):
        after, state, _ = private_step(
            loss, optimizer, Clipping(0.5, 2), run, after, state, frozen, nothing,
            jax.random.key(key),
        )  # fmt: skip
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), after, trainable)
    for part in parts:
        values = np.concatenate([x.reshape(-1) for x in of_part(moved, part).values()])
        assert (values != 0).all(), part
        expected = 2.0 / 4 * np.sqrt(3)
        assert values.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * len(values))), part


# As an owner does it.


@pytest.fixture(scope="module")
def private(world, tmp_path_factory):
    """The folder of an owner whose private expert has both heads, as its anchor has one."""
    folder = tmp_path_factory.mktemp("parts")
    world.anchor_with_evidence(folder / "anchor", 4)
    shutil.copy(world.texts["math"], folder / "math.jsonl")
    words = [
        *world.expert_words(folder / "out", data=folder / "math.jsonl", run=folder / "run"),
        "--anchor", folder / "anchor", "--dp-epsilon", 4, "--dp-windows", 2,
        "--dp-microbatch-size", 4, "--head-rank", 6, "--evidence-rank", 4,
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    return folder


def test_the_certificate_lists_the_parts_and_the_ledger_has_one_run(private, flexolmo):
    said = read_manifest(private / "out")["privacy"]
    assert said["parts"] == ["feed_forward", "router", "head", "evidence"]
    assert 3.8 < said["epsilon"] == said["epsilon_of_all_runs"] <= 4
    (run,) = json.loads((private / "budget.json").read_text())["runs"]
    assert run["finished"] and run["steps"] == said["steps"] and run["spent_epsilon"] <= 4
    code, printed, error = flexolmo("privacy", "verify", private / "out")
    assert code == 0, error
    assert "feed_forward, router, head, evidence" in printed


def test_no_weight_of_a_head_leaves_without_noise(private, world):
    anchor = read_anchor(private / "anchor")
    config = world.config("alone", **HEADS)
    start = tensors.named(initial_expert(config, anchor.config, anchor.weights.public))
    trained = tensors.named(read_expert(private / "out", anchor))
    assert trained.keys() == start.keys()
    assert np.asarray(start["evidence.b"]).any()  # it began as the public one
    for name, value in trained.items():
        if not name.startswith("router"):  # its rows are fitted to a release of their own
            assert not np.any(np.asarray(value) == np.asarray(start[name])), name


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["feed_forward", "router"], "and its expert also has head, evidence"),
        (None, "and its expert also has head, evidence"),  # as older certificates were
        (["feed_forward", "router", "head"], "and its expert also has evidence"),
        ("all", "parts must be a list of names, found 'all'"),
    ],
)
def test_a_part_that_a_certificate_does_not_cover_is_refused(
    private, tmp_path, refused, parts, message
):
    package = tmp_path / "package"
    shutil.copytree(private / "out", package)
    manifest = read_manifest(package)
    certificate = {**manifest["privacy"], "parts": parts}
    if parts is None:
        del certificate["parts"]
    write_manifest(package, {**manifest, "privacy": certificate})
    assert message in refused("privacy", "verify", package)


def test_an_experts_parts_are_those_that_it_has(world):
    expert: Experts = read_anchor(world.anchor).weights.public
    assert expert.parts == ("feed_forward", "router")
    expert.set_heads(read_anchor(world.anchor).config, Ranks(head=6, evidence=4), jax.random.key(0))
    assert expert.parts == ("feed_forward", "router", "head", "evidence")
    assert with_parts(expert, head=None).parts == ("feed_forward", "router", "evidence")
    assert {name.split(".")[0] for name in tensors.named(expert)} == {*expert.parts}
