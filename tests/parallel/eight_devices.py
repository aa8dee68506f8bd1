"""Several devices against one: losses, gradients, logits, generation; and what the program moves.

Run by test_eight_devices.py in a process of its own, which has eight virtual devices.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

from flexolmo_jax.config import ModelConfig, OptimizerConfig  # noqa: E402
from flexolmo_jax.data.batches import Batch  # noqa: E402
from flexolmo_jax.federation.loading import join_experts  # noqa: E402
from flexolmo_jax.model import FlexOlmo  # noqa: E402
from flexolmo_jax.modeling.experts import (  # noqa: E402
    NO_HEADS,
    Experts,
    Ranks,
    join,
    pad_experts,
    select,
)
from flexolmo_jax.modeling.low_rank import FeedForwardRanks  # noqa: E402
from flexolmo_jax.modeling.transformer import Anchor, abstract_model  # noqa: E402
from flexolmo_jax.parallel import placement  # noqa: E402
from flexolmo_jax.parallel.mesh import make_mesh, num_shards, shardings  # noqa: E402
from flexolmo_jax.privacy.accounting import Mechanism  # noqa: E402
from flexolmo_jax.privacy.mechanism import Clipping  # noqa: E402
from flexolmo_jax.storage import tensors  # noqa: E402
from flexolmo_jax.training.gradients import gradients  # noqa: E402
from flexolmo_jax.training.objectives import (  # noqa: E402
    AnchorLoss,
    ExpertAloneLoss,
    ExpertPairLoss,
    OwnParts,
    RouterLoss,
    RouterRows,
)
from flexolmo_jax.training.optimizer import make_optimizer  # noqa: E402
from flexolmo_jax.training.private.steps import private_step  # noqa: E402
from flexolmo_jax.training.step import train_step  # noqa: E402

CONFIG = ModelConfig(
    vocab_size=96, width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=48, num_experts=7
)
RANKS = {"alone": Ranks(head=3, evidence=5), "router": Ranks(head=3)}  # of a stage's experts
SHAPES = {"8x1": 1, "2x4": 4, "1x8": 8}  # data x expert
OF_TRAINING = {name: (size, 1) for name, size in SHAPES.items()}
OF_TRAINING |= {"4x1x2": (1, 2), "2x2x2": (2, 2)}  # x tensor


@pytest.fixture(scope="module", params=SHAPES)
def mesh(request):
    assert jax.device_count() == 8
    yield make_mesh(SHAPES[request.param])
    jax.clear_caches()  # compiled programs hold memory maps; at 65530 of them Linux ends a process


@pytest.fixture(scope="module", params=OF_TRAINING)
def training_mesh(request):
    experts, tensor = OF_TRAINING[request.param]
    yield make_mesh(experts, tensor_parallel=tensor)
    jax.clear_caches()


def weights(config, ranks=NO_HEADS):
    """A backbone and a stack in host memory, with nothing left at 0 or 1."""
    return drawn(abstract_model(config, ranks))


def low_rank_expert(config):
    ranks = FeedForwardRanks(gate=3, up=2, down=4)
    return drawn(
        jax.eval_shape(
            lambda key: Experts(config, 1, key, RANKS["alone"], ranks), jax.random.key(0)
        )
    )


def drawn(shapes):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        drawn = 0.2 * rng.standard_normal(leaf.shape, np.float32)
        return 1 + drawn if "norm" in name else -abs(drawn) if "bias" in name else drawn

    return jax.tree_util.tree_map_with_path(draw, shapes)


def some_batch(rows=16, length=24):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, length + 1)).astype(np.int32)
    segments = np.cumsum(rng.random((rows, length + 1)) < 0.1, axis=1).astype(np.int32) + 1
    segments[3, 10:] = 0  # padding, so that devices differ in how much text they have
    segments[11:] = 0
    return Batch.of(tokens, segments)


def stage(name, config, multiple=1):
    """A loss, what it trains, and what is frozen."""
    name, _, size = name.partition(" ")
    backbone, experts = weights(config, RANKS.get(name, NO_HEADS))
    anchor = Anchor(backbone, select(experts, [0]))
    own = low_rank_expert(config) if size else select(experts, [1])
    pair = config.replace(num_experts=2, active_experts=None)
    if name == "anchor":
        return AnchorLoss(pair, 1e-4), anchor, None
    if name == "alone":
        return ExpertAloneLoss(pair, 1e-4), OwnParts.of(own), (anchor, own.router)
    if name == "pair":
        return ExpertPairLoss(pair, 1e-4, 1e-3), own, anchor
    filled = pad_experts(experts, multiple)
    return RouterLoss(config, 1e-4, 1e-3), RouterRows.of(filled.router), (backbone, filled)


def run_gradients(loss, trainable, frozen, mesh=None, microbatches=1):
    batch = some_batch()
    batch = batch._replace(weights=batch.weights / jnp.sum(batch.weights))
    trainable, frozen = placement.device_put((trainable, frozen), mesh)
    batch = placement.put_batch(batch, mesh)
    run = jax.jit(gradients, static_argnums=(0, 1, 5))
    with placement.use_mesh(mesh):
        return placement.to_host(run(loss, mesh, trainable, frozen, batch, microbatches))


def assert_close(found, expected):
    found, expected = tensors.named(found), tensors.named(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = np.asarray(value)
        other = found[name][tuple(slice(size) for size in value.shape)]
        np.testing.assert_allclose(
            other, value, rtol=0, atol=1e-5 * (np.abs(value).max() + 1e-6), err_msg=name
        )


@functools.cache
def alone(name, config):
    return run_gradients(*stage(name, config))


STAGES = ["anchor", "alone", "pair", "router"]
VARIANTS = {
    (2, 1): {"remat": "layer", "tie_embeddings": True, "memory": (0.8, 0.3)},
    (4, 1): {"remat": "matmuls", "expert_compute": "grouped", "active_experts": 3},
    (1, 2): {"remat": "wide_matmuls", "tie_embeddings": True, "expert_compute": "grouped"},
}


# Every stage on two meshes that divide experts or units; two stages on each other mesh.
PLACES = [(mesh, name) for mesh in ("2x4", "2x2x2") for name in STAGES]
PLACES += [(mesh, name) for mesh in ("8x1", "1x8", "4x1x2") for name in ("alone", "router")]


@pytest.mark.parametrize(("training_mesh", "name"), PLACES, indirect=["training_mesh"])
def test_losses_and_gradients_are_those_of_one_device(training_mesh, name):
    found = run_gradients(*stage(name, CONFIG, training_mesh.shape["expert"]), mesh=training_mesh)
    assert_close(found, alone(name, CONFIG))


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_low_rank_experts_too(shape):
    mesh, name = make_mesh(shape[0], tensor_parallel=shape[1]), "alone low_rank"
    assert_close(run_gradients(*stage(name, CONFIG), mesh=mesh), alone(name, CONFIG))


@pytest.mark.parametrize("shape", VARIANTS)
@pytest.mark.parametrize("name", ["anchor", "pair", "router"])
def test_so_they_are_recomputed_grouped_and_in_microbatches(name, shape):
    mesh = make_mesh(shape[0], tensor_parallel=shape[1])
    config, microbatches = CONFIG.replace(**VARIANTS[shape]), 2
    found = run_gradients(
        *stage(name, config, mesh.shape["expert"]), mesh=mesh, microbatches=microbatches
    )
    assert_close(found, alone(name, config))


MIXTURES = {
    "memory": ({"memory": (0.8, 0.3)}, SHAPES),
    "three": ({"active_experts": 3}, ["2x4"]),
    "evidence": ({"evidence": (0.9, 0.5, 0.1), "active_experts": 3}, ["2x4", "1x8"]),
}
PLACED = [(name, shape) for name, (_, shapes) in MIXTURES.items() for shape in shapes]


@pytest.fixture(scope="module", params=PLACED, ids="-".join)
def models(request):
    name, shape = request.param
    mesh = make_mesh(SHAPES[shape])
    config = CONFIG.replace(**MIXTURES[name][0])
    backbone, experts = weights(config, RANKS["alone"] if config.evidence else NO_HEADS)
    names = tuple("abcdefg")
    plain = FlexOlmo(backbone, experts, config, names, None)
    placed = placement.device_put((backbone, pad_experts(experts, mesh.shape["expert"])), mesh)
    yield plain, FlexOlmo(*placed, config, names, None, mesh=mesh)
    jax.clear_caches()  # as above


PROMPTS = [[1, 2, 3], [4], list(range(5, 25)), [7, 7], [9]]


@pytest.mark.parametrize("without", [[], ["a", "f"]])
def test_logits_and_generation_are_those_of_one_device(models, without):
    plain, spread = models
    tokens = np.arange(60).reshape(5, 12)
    expected = np.asarray(plain.logits(tokens, without=without))
    found = np.asarray(spread.logits(tokens, without=without))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    options = {"temperature": 1.0, "top_k": 20, "seed": 3} if without else {}  # compiled once each
    assert spread.generate(PROMPTS, 8, without=without, **options) == plain.generate(
        PROMPTS, 8, without=without, **options
    )


@pytest.mark.parametrize(
    "models", [("memory", "8x1"), ("evidence", "2x4")], ids="-".join, indirect=True
)
def test_an_engine_gives_the_tokens_of_one_device(models):
    """With masks of their own, in slots that are used again, and with prefixes that are kept."""
    plain, spread = models
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, 96, n).tolist() for n in (1, 40, 5, 33, 160, 2, 7, 12, 3, 40)]

    def run(model, slots, prefixes):
        engine = model.engine(slots, 200, prefixes)
        requests = [
            model.request(prompt, 6, without=["ab"[i % 2]], temperature=0.8 * (i % 3 > 1), seed=i)
            for i, prompt in enumerate([*prompts, prompts[1]])
        ]
        for request in requests:
            engine.add(request)
        while engine.step():
            pass
        return requests

    for one, other in zip(run(plain, 4, 0), run(spread, 4, 2), strict=True):
        assert other.generated == one.generated and len(one.generated) == 6
        np.testing.assert_allclose(other.shares, one.shares, atol=1e-5)


def test_masks_of_each_sequence_go_where_their_sequence_goes(models):
    plain, spread = models
    allowed = np.random.default_rng(0).random((5, 7)) < 0.5
    allowed[:, 2] = True
    expected, found = [], []  # the routing mass, too
    assert spread.generate(PROMPTS, 8, allowed=allowed, on_mass=found.append) == plain.generate(
        PROMPTS, 8, allowed=allowed, on_mass=expected.append
    )
    for mass, known in zip(found, expected, strict=True):
        assert mass == pytest.approx(known, abs=2e-4)


RANKS_OF_MERGED = (None, FeedForwardRanks(3, 2, 4), FeedForwardRanks(5, 5, 5))


@functools.cache
def merged_of_sizes(full):
    """A backbone, and experts in stacks of one: the first are full, the others of two ranks."""
    backbone, experts = jax.device_put(weights(CONFIG))
    kinds = [RANKS_OF_MERGED[0 if e < full else 1 + e // 5] for e in range(CONFIG.num_experts)]
    stacks = [select(experts, [e]) for e in range(CONFIG.num_experts)]
    for stack, ranks in zip(stacks, kinds, strict=True):
        if ranks is not None:
            init = lambda key, ranks=ranks: Experts(CONFIG, 1, key, deltas=ranks)  # noqa: E731
            low_rank = jax.device_put(drawn(jax.eval_shape(init, jax.random.key(0))))
            shift = 0.1 * jnp.mean(stack.router.row[...])  # no two alike
            own = jax.tree.map(lambda x, shift=shift: x + shift, low_rank.feed_forward)
            stack.feed_forward = own
    return backbone, stacks


@pytest.mark.parametrize(("shape", "full"), [("2x4", 1), ("2x4", 3), ("1x8", 3)])
def test_a_mixture_of_full_and_low_rank_experts_is_that_of_full_ones(shape, full):
    mesh, config = make_mesh(SHAPES[shape]), CONFIG.replace(active_experts=3)
    backbone, stacks = merged_of_sizes(full)
    names, tokens = tuple("abcdefg"), np.arange(60).reshape(5, 12)
    plain = FlexOlmo(backbone, join(*stacks), config, names, None)
    experts, _ = join_experts(stacks, mesh.shape["expert"])
    assert any(leaf.shape[-1] == 5 for leaf in jax.tree.leaves(experts.feed_forward.low_rank))
    placed = placement.device_put((backbone, experts), mesh, ())
    spread = FlexOlmo(*placed, config, names, None, mesh=mesh)
    for without in ([], ["a", "c", "f"]):
        expected = np.asarray(plain.logits(tokens, without=without))
        found = np.asarray(spread.logits(tokens, without=without))
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert spread.generate(PROMPTS, 6) == plain.generate(PROMPTS, 6)
    jax.clear_caches()


@pytest.mark.parametrize(("shape", "full"), [((4, 1), 3), ((2, 2), 1), ((2, 2), 3)])
def test_the_router_of_a_mixture_is_trained_as_beside_full_ones(shape, full):
    mesh = make_mesh(shape[0], tensor_parallel=shape[1])
    backbone, stacks = merged_of_sizes(full)
    loss, rows = RouterLoss(CONFIG, 1e-4, 1e-3), RouterRows.of(join(*stacks).router)
    experts, _ = join_experts(stacks, mesh.shape["expert"])
    expected = run_gradients(loss, rows, (backbone, join(*stacks)))
    assert_close(run_gradients(loss, rows, (backbone, experts), mesh), expected)


COLLECTIVE = re.compile(
    r"= \(?(\w+)\[([\d,]*)\][^=]*? (all-gather|all-reduce|reduce-scatter|all-to-all"
    r"|collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
EXPECTED = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}


@pytest.mark.parametrize(("training_mesh", "name"), [
    *((mesh, "anchor") for mesh in OF_TRAINING), ("2x4", "router"), ("2x2x2", "router")
], indirect=["training_mesh"])  # fmt: skip
def test_the_compiled_step_moves_one_layers_matrices_at_a_time(training_mesh, name):
    mesh = training_mesh
    config = CONFIG.replace(num_layers=5, width=64, ffn_width=160, vocab_size=192)
    config = config.replace(remat="layer")
    loss, trainable, frozen = stage(name, config, mesh.shape["expert"])
    trainable, frozen = placement.device_put((trainable, frozen), mesh)
    optimizer = optax.adamw(1e-3)
    batch = placement.put_batch(some_batch(length=16), mesh)
    with placement.use_mesh(mesh):
        state = jax.jit(optimizer.init)(trainable)
        step = train_step.lower(loss, optimizer, trainable, state, frozen, batch, mesh=mesh)
        found = COLLECTIVE.findall(step.compile().as_text())
    assert found and {kind for *_, kind in found} <= EXPECTED
    stacked = len(tensors.named(frozen)) and config.num_layers
    largest = max(
        config.num_experts * config.width * config.ffn_width, config.vocab_size * config.width
    )
    for dtype, shape, kind in found:
        dims = [int(size) for size in shape.split(",") if size]
        if kind == "all-reduce":  # norms, router rows, sums: never a matrix
            continue
        assert np.prod(dims) <= (largest + 8 * config.width * config.ffn_width), (kind, shape)
        assert dtype in ("f32", "s32"), dtype
        assert not (stacked and dims[:1] == [stacked] and len(dims) > 3), (kind, shape)
    reduced = [int(np.prod([int(n) for n in s.split(",") if n])) for _, s, k in found
               if k == "all-reduce"]  # fmt: skip
    small = 5 * 8 * config.width  # router rows of all layers
    if mesh.shape["tensor"] > 1:  # activations [B, S, D], and the head's gradient, cut
        cut = config.vocab_size * config.width // num_shards(mesh)
        small = max(small, 16 * 16 * config.width, cut)
    assert all(size <= small for size in reduced), reduced
    held = sum(
        shard.data.nbytes for leaf in jax.tree.leaves((trainable, frozen))
        for shard in leaf.addressable_shards[:1]
    )  # fmt: skip
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves((trainable, frozen)))
    assert held < everything / 6  # an eighth, and the small ones


# Muon orthogonalizes whole matrices, of which every device holds a shard.
MUON = make_optimizer(OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.1), 9)


def low_rank_head():
    """As a low-rank head has them: replicated."""
    draw = np.random.default_rng(4).standard_normal
    return {name: jnp.asarray(draw(shape, np.float32))
            for name, shape in {"a": (1, 8, 32, 6), "b": (1, 8, 6, 96)}.items()}  # fmt: skip


def test_muon_updates_a_mixture_as_one_device_does(training_mesh):
    """Eight experts, so that the axis `expert` shards them; three layers, which nothing divides."""
    mesh = training_mesh
    start = (*weights(CONFIG.replace(num_layers=3, num_experts=8)), low_rank_head())
    grads = [jax.tree.map(lambda x, k=k: jnp.sin(k * x * 100), start) for k in (1, 2)]

    def updates(mesh):
        with placement.use_mesh(mesh):
            placed = placement.device_put(start, mesh)
            state, found = jax.jit(MUON.init)(placed), None
            for grad in placement.device_put(grads, mesh):
                found, state = jax.jit(MUON.update)(grad, state, placed)
        return found, state

    (expected, kept), (found, held) = updates(None), updates(mesh)
    cut = tensors.named(shardings((found, held), mesh))
    for name, leaf in tensors.named((found, held)).items():
        assert leaf.sharding.is_equivalent_to(cut[name], leaf.ndim), name
    assert_close(placement.to_host(found), jax.device_get(expected))
    assert_close(placement.to_host(held), jax.device_get(kept))


@pytest.mark.parametrize("training_mesh", ["2x4", "2x2x2"], indirect=True)
def test_a_step_with_muon_is_that_of_one_device(training_mesh):
    mesh, microbatches = training_mesh, 2
    loss, trainable, frozen = stage("anchor", CONFIG)

    def step(mesh, microbatches=1):
        start, rest = placement.device_put(jax.tree.map(jnp.copy, (trainable, frozen)), mesh)
        batch = placement.put_batch(some_batch(), mesh)
        with placement.use_mesh(mesh):
            state = jax.jit(MUON.init)(start)
            lowered = train_step.lower(
                loss, MUON, start, state, rest, batch, mesh=mesh, microbatches=microbatches
            )
            compiled = lowered.compile()
            moved, _, told = compiled(start, state, rest, batch)
        return compiled, placement.to_host((moved, told))

    program, (found, told) = step(mesh, microbatches)
    _, (expected, said) = step(None)
    change, moved = (
        jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after, trainable)
        for after in (found, expected)
    )
    for name, one in tensors.named(moved).items():
        np.testing.assert_allclose(
            tensors.named(change)[name], one, atol=2e-3 * np.abs(one).max(), err_msg=name
        )
    np.testing.assert_allclose(told["loss"], said["loss"], rtol=1e-5)
    assert {kind for *_, kind in COLLECTIVE.findall(program.as_text())} <= EXPECTED


def test_an_optimizer_step_keeps_everything_in_its_place(mesh):
    loss, trainable, frozen = stage("pair", CONFIG)
    optimizer = optax.adamw(1e-3)
    expected = jax.tree.map(jnp.copy, trainable)
    expected, *_ = train_step(
        loss, optimizer, expected, optimizer.init(expected), frozen, some_batch()
    )
    trainable, frozen = placement.device_put((trainable, frozen), mesh)
    batch = placement.put_batch(some_batch(), mesh)
    with placement.use_mesh(mesh):
        state = jax.jit(optimizer.init)(trainable)
        before = jax.tree.map(lambda leaf: leaf.sharding, (trainable, state))
        trainable, state, _ = train_step(
            loss, optimizer, trainable, state, frozen, batch, mesh=mesh
        )
    after = jax.tree.map(lambda leaf: leaf.sharding, (trainable, state))
    for one, other, leaf in zip(
        *map(jax.tree.leaves, (before, after)), jax.tree.leaves((trainable, state)), strict=True
    ):
        assert one.is_equivalent_to(other, leaf.ndim)
    assert_close(placement.to_host(trainable), jax.device_get(expected))


PRIVATE_ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


@pytest.mark.parametrize("name", ["alone", "pair"])
@pytest.mark.parametrize("optimizer", [PRIVATE_ADAMW, MUON], ids=["adamw", "muon"])
def test_a_private_step_is_that_of_one_device(name, optimizer):
    """Clipped unit by unit on each device, summed, and the noise added once."""
    mesh = make_mesh()
    loss, trainable, frozen = stage(name, CONFIG)
    flat = some_batch(rows=48, length=12)
    units = jax.tree.map(lambda x: x.reshape(24, 2, 12), flat)  # the last ones are padding
    clip, run = Clipping(0.05, 1), Mechanism(100, 8, 24, 5, noise_multiplier=0.3)

    def steps(mesh):
        start = jax.tree.map(jnp.copy, trainable)
        placed = placement.device_put(start, mesh)
        rest = placement.device_put(frozen, mesh, ())
        batch = placement.put_batch(units, mesh)
        with placement.use_mesh(mesh):
            state = jax.jit(optimizer.init)(placed)
            cut = jax.tree.map(lambda x: x.sharding, placed)
            for number in range(3):
                placed, state, metrics = private_step(
                    loss, optimizer, clip, run, placed, state, rest, batch,
                    jax.random.key(number), mesh=mesh,
                )  # fmt: skip
        assert jax.tree.all(
            jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim), placed, cut)
        )
        return placement.to_host((placed, metrics))

    (found, told), (expected, said) = steps(mesh), steps(None)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), expected, trainable)
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, trainable)
    for one, other in zip(jax.tree.leaves(change), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(other).max())
    assert 0 < said["clipped"] <= 1
    for key, value in said.items():
        np.testing.assert_allclose(told[key], value, rtol=1e-4, err_msg=key)


def test_what_cannot_be_divided_is_said():
    mesh = make_mesh(2)
    with pytest.raises(ValueError, match="must divide the number of devices, 8; found 3 times 1"):
        make_mesh(3)
    with pytest.raises(ValueError, match="a multiple of 8"):
        placement.put_batch(some_batch(rows=12), mesh)
    odd = weights(CONFIG.replace(width=36, num_heads=2, num_kv_heads=2))
    with pytest.raises(ValueError, match="cannot be sharded evenly over 8 devices along its 36"):
        placement.device_put(odd, mesh)
