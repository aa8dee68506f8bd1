"""What a merged model's router remembers of a document, against the slow obvious loop."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexolmo_jax as fo
from flexolmo_jax.config import MEMORY
from flexolmo_jax.inference import decode, engine
from flexolmo_jax.inference.continuations import Options
from flexolmo_jax.inference.sampling import Sampling
from flexolmo_jax.modeling.experts import moe, pad_experts
from flexolmo_jax.modeling.router import add_decayed_logits
from flexolmo_jax.modeling.transformer import forward

EXPERTS, BATCH, LENGTH = 3, 2, 11
SEGMENTS = np.array([[1] * 5 + [2] * 6, [0] * 2 + [4] * 3 + [3] * 6])  # 0 is padding
STRONG = (0.9, 2.0)
PROMPTS = [[0, 300, 301], [0, 42], [0, 7, 8, 9, 260, 261, 300, 17, 18, 19]]
TOKENS = np.random.default_rng(0).integers(0, 512, (2, 24)).astype(np.int32)


def loop(logits, segments, memory, past):
    """The definition: token by token, every earlier one of the same document."""
    decay, weight = memory
    out, sums = [], []
    for t in range(logits.shape[-1]):
        added = jnp.zeros_like(past)
        for s in range(-1, t):
            of_it = past if s < 0 else logits[:, :, s] * (segments[:, s] == segments[:, t])
            whole = np.all(segments[:, : t + 1] == segments[:, t : t + 1], axis=1)
            of_it = of_it * whole if s < 0 else of_it
            added = added + decay ** (t - s) * of_it
        out.append(logits[:, :, t] + weight * added)
        sums.append(logits[:, :, t] + added)
    return jnp.stack(out, axis=-1), sums[-1]


@pytest.fixture(scope="module")
def drawn():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jax.random.normal(keys[0], (EXPERTS, BATCH, LENGTH))
    return logits, jax.random.normal(keys[1], (EXPERTS, BATCH)), keys[2]


@pytest.mark.parametrize("memory", [MEMORY, (0.99, 1.5), (0.01, 7.0)])
def test_forward_and_gradient_are_those_of_the_loop(drawn, memory):
    logits, past, key = drawn
    weights = jax.random.normal(key, logits.shape)

    def value(function, logits, past):
        out, after = function(logits, SEGMENTS, memory, past)
        return jnp.sum(weights * jnp.tanh(out)) + jnp.sum(after**2), (out, after)

    found, expected = (
        jax.jit(jax.value_and_grad(value, (1, 2), has_aux=True), static_argnums=0)(
            function, logits, past
        )
        for function in (add_decayed_logits, loop)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max()),
        found, expected,
    )  # fmt: skip


def test_in_pieces_it_is_as_in_one(drawn):
    logits, past, _ = drawn
    whole, last = add_decayed_logits(logits, SEGMENTS[:1].repeat(BATCH, 0) * 0 + 1, STRONG, past)
    pieces = []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, LENGTH)):
        ones = np.ones((BATCH, stop - start), int)
        out, past = add_decayed_logits(logits[..., start:stop], ones, STRONG, past)
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, -1), whole, atol=1e-5)
    np.testing.assert_allclose(past, last, atol=1e-5)


def test_it_starts_again_with_each_document_bit_for_bit(drawn):
    logits, past, key = drawn
    before = jax.random.normal(key, logits.shape)
    other = jnp.where(SEGMENTS == SEGMENTS[:, -1:], logits, before)
    nowhere = jnp.where(SEGMENTS == SEGMENTS[:, -1:], logits, jnp.inf)
    last = SEGMENTS == SEGMENTS[:, -1:]
    run = jax.jit(add_decayed_logits, static_argnums=2)
    found, after = run(logits, SEGMENTS, STRONG, past)
    for changed in (other, nowhere):
        again, same = run(changed, SEGMENTS, STRONG, -past)
        np.testing.assert_array_equal(found[:, last], again[:, last])
        np.testing.assert_array_equal(after, same)


def test_an_expert_remembers_only_itself_bit_for_bit(drawn):
    """Whatever the others are, how many there are, and where it stands."""
    logits, past, _ = drawn
    run = jax.jit(add_decayed_logits, static_argnums=2)
    whole = run(logits, SEGMENTS, MEMORY, past)
    for order in ([0, 2], [2, 1], [1, 2, 0, 0]):
        part = run(logits[jnp.array(order)], SEGMENTS, MEMORY, past[jnp.array(order)])
        for place, expert in enumerate(order):
            np.testing.assert_array_equal(part[0][place], whole[0][expert])
            np.testing.assert_array_equal(part[1][place], whole[1][expert])
    broken = run(logits.at[1].set(jnp.nan), SEGMENTS, MEMORY, past)
    for expert in (0, 2):
        np.testing.assert_array_equal(broken[0][expert], whole[0][expert])


def test_a_constant_common_to_all_experts_changes_no_weight(drawn):
    """So a memory of logits is one of logits relative to the public expert's."""
    logits, past, _ = drawn
    own, _ = add_decayed_logits(logits, SEGMENTS, STRONG, past)
    relative, _ = add_decayed_logits(logits - logits[:1], SEGMENTS, STRONG, past - past[:1])
    np.testing.assert_allclose(jax.nn.softmax(own, 0), jax.nn.softmax(relative, 0), atol=1e-5)


def test_empty_experts_stay_out_and_leave_gradients_finite(drawn):
    """Their logits are -inf; 0 times that would be NaN."""
    logits, past, _ = drawn
    filled = jnp.concatenate([logits, jnp.full((1, BATCH, LENGTH), -jnp.inf)])
    pasts = jnp.concatenate([past, jnp.full((1, BATCH), -jnp.inf)])

    def share(logits):
        return jax.nn.softmax(add_decayed_logits(logits, SEGMENTS, STRONG, pasts)[0], axis=0)

    found = share(filled)
    assert not found[-1].any()
    expected = jax.nn.softmax(add_decayed_logits(logits, SEGMENTS, STRONG, past)[0], axis=0)
    np.testing.assert_allclose(found[:-1], expected, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(share(x)[0] ** 2))(filled)
    assert np.isfinite(gradient).all() and not gradient[-1].any() and gradient[:-1].any()


# In the model.


def remembering(model, memory=STRONG):
    return dataclasses.replace(model, config=model.config.replace(memory=memory))


def test_a_layer_routes_by_what_is_remembered(model):
    config = model.config.replace(memory=STRONG)
    layer = jax.tree.map(lambda leaf: leaf[0], model.experts)
    x = jax.random.normal(jax.random.key(1), (2, 7, config.width))
    allowed = jnp.ones((2, 4), bool)
    out, logits, past, _ = moe(x, (layer,), allowed, config)
    routing, after = add_decayed_logits(logits, jnp.ones((2, 7), int), STRONG, jnp.zeros((4, 2)))
    np.testing.assert_allclose(past, after, atol=1e-6)
    plain = config.replace(memory=None)
    expected, without, nothing, _ = moe(x, (layer,), allowed, plain)
    np.testing.assert_array_equal(logits, without)
    assert nothing is None and not np.allclose(out, expected)
    # By hand: the same mixture with the remembered logits put in the place of the rows' own.
    weights = jax.nn.softmax(routing, axis=0)
    by_hand = layer.feed_forward.add_dense(jnp.zeros_like(x), x, weights)
    np.testing.assert_allclose(out, by_hand, atol=1e-5 * np.abs(by_hand).max())


def test_a_weak_memory_changes_little_and_none_changes_nothing(model):
    plain = remembering(model, None).logits(TOKENS)
    weak = remembering(model, (0.5, 1e-7)).logits(TOKENS)
    np.testing.assert_allclose(weak, plain, atol=1e-5 * np.abs(plain).max())
    assert np.abs(remembering(model).logits(TOKENS) - plain).max() > 1e-3 * np.abs(plain).max()


def test_only_what_came_before_is_remembered(model):
    """Causal: the first token routes as without memory, and no later token changes an earlier."""
    strong = remembering(model)
    found = np.asarray(strong.logits(TOKENS))
    plain = np.asarray(remembering(model, None).logits(TOKENS))
    np.testing.assert_allclose(found[:, 0], plain[:, 0], atol=1e-5 * np.abs(plain).max())
    changed = TOKENS.copy()
    changed[:, 12:] = 3
    np.testing.assert_array_equal(np.asarray(strong.logits(changed))[:, :12], found[:, :12])


@pytest.mark.parametrize(
    ("prompts", "active"), [(PROMPTS, None), (PROMPTS[2:], 2)], ids=["three", "one, 2 of 4"]
)
def test_the_decode_state_is_that_of_the_whole_text(model, prompts, active):
    """Step by step, in both decoders: the tokens that one forward pass finds likeliest."""
    strong = remembering(model)
    strong = dataclasses.replace(strong, config=strong.config.replace(active_experts=active))
    options = Options(max_new_tokens=12, stop=(), sampling=Sampling(), seed=0)
    allowed = np.ones((len(prompts), 4), bool)
    stacks = strong.backbone, strong.experts, strong.config
    for pieces in (
        decode.generate(*stacks, prompts, allowed, options),
        engine.generate(strong._network(len(prompts)), prompts, allowed, options),
    ):
        [made] = pieces
        for prompt, new in zip(prompts, made.generated, strict=True):
            text = np.zeros((1, 32), int)  # what comes later cannot be seen
            text[0, : len(prompt) + len(new)] = [*prompt, *new]
            likeliest = np.argmax(strong.logits(text)[0], axis=-1)
            assert new == likeliest[len(prompt) - 1 :][: len(new)].tolist()
    without = remembering(model, None).generate(prompts, 12)
    assert active or made.generated != without


def test_a_masked_expert_equals_one_that_was_never_merged_bit_for_bit(model):
    strong = remembering(model)
    kept = [0, 1, 3]
    part = dataclasses.replace(
        strong,
        experts=jax.tree.map(lambda leaf: leaf[:, jnp.array(kept)], strong.experts),
        expert_names=tuple(strong.expert_names[i] for i in kept),
        config=strong.config.replace(num_experts=3),
    )
    broken = jax.tree.map(lambda leaf: leaf.at[:, 2].set(jnp.nan), strong.experts)
    expected = np.asarray(part.logits(TOKENS))
    for one in (strong, dataclasses.replace(strong, experts=broken)):
        np.testing.assert_array_equal(one.logits(TOKENS, without="code"), expected)
        made = one.generate(PROMPTS, 12, without="code")
        assert made == part.generate(PROMPTS, 12)


def test_the_router_is_tuned_as_it_will_be_used(model):
    """Gradients reach the rows through the memory, also past padding experts."""
    config = model.config.replace(memory=STRONG)
    experts = pad_experts(model.experts, 3)

    def loss(row):
        stack = jax.tree.map(lambda leaf: leaf, experts)
        stack.router.row[...] = row
        out = forward(model.backbone, (stack,), TOKENS, config)
        return jnp.mean(out.hidden**2 * jnp.arange(out.hidden.shape[-1]))

    row = experts.router.row[...]
    slope = jax.jit(jax.grad(loss))(row)
    assert np.isfinite(slope).all() and slope[:, :4].any() and not slope[:, 4:].any()
    step = 1e-3 * slope / jnp.linalg.norm(slope)
    measured = (loss(row + step) - loss(row - step)) / (2 * jnp.linalg.norm(step))
    np.testing.assert_allclose(measured, jnp.linalg.norm(slope), rtol=2e-2)


# From the command line to the loaded model.


def merged(flexolmo, world, out, *more):
    code, printed, error = flexolmo(
        "merge", "--anchor", world.anchor, "--expert", world.experts["math"], "--out", out, *more
    )
    assert code == 0, error
    return json.loads((out / "manifest.json").read_text()), printed


def test_the_choice_is_kept_from_the_command_to_the_model(world, flexolmo, tmp_path):
    manifest, printed = merged(flexolmo, world, tmp_path / "default")
    assert manifest["memory"] == {"decay": 0.8, "weight": 0.3} and "memory 0.8 0.3" in printed
    assert fo.load(tmp_path / "default").config.memory == MEMORY
    manifest, _ = merged(flexolmo, world, tmp_path / "chosen", "--memory", 0.5, 1)
    assert fo.load(tmp_path / "chosen").config.memory == (0.5, 1.0)
    manifest, printed = merged(flexolmo, world, tmp_path / "none", "--no-memory")
    assert manifest["memory"] is None and "no router memory" in printed
    plain = fo.load(tmp_path / "none")
    assert plain.config.memory is None
    # Without one it is the owner's own two-expert model.
    pair = fo.load(world.experts["math"], anchor=world.anchor)
    np.testing.assert_array_equal(plain.logits(TOKENS), pair.logits(TOKENS))
    shown = json.loads(flexolmo("inspect", tmp_path / "chosen", "--json")[1])
    assert shown["memory"] == {"decay": 0.5, "weight": 1.0}


def test_adding_and_removing_experts_keeps_it(world, flexolmo, tmp_path):
    merged(flexolmo, world, tmp_path / "model", "--memory", 0.5, 1)
    assert flexolmo("experts", "add", tmp_path / "model", world.experts["code"])[0] == 0
    assert flexolmo("experts", "remove", tmp_path / "model", "math")[0] == 0
    model = fo.load(tmp_path / "model")
    assert model.config.memory == (0.5, 1.0) and model.expert_names == ("public", "code")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--memory", 1, 0.3), "memory must be a decay in (0, 1) and a weight above 0, found 1.0"),
        (("--memory", 0, 0), "--no-memory"),
        (("--memory", 0.8, "nan"), "a weight above 0, found 0.8 and nan"),
        (("--memory", "nan", 0.3), "found nan and 0.3"),
        (("--memory", 0.8, -1), "found 0.8 and -1.0"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(world, refused, tmp_path, given, said):
    error = refused(
        "merge", "--anchor", world.anchor, "--expert", world.experts["math"],
        "--out", tmp_path / "out", *given,
    )  # fmt: skip
    assert said in error and not (tmp_path / "out").exists()


def test_the_command_takes_two_numbers_or_none(world, flexolmo, tmp_path):
    common = ("merge", "--anchor", world.anchor, "--expert", world.experts["math"])
    for given, said in (
        (("--memory", 0.8), "expected 2 arguments"),
        (("--memory", "strong", 1), "invalid float value: 'strong'"),
        (("--memory", 0.8, 1, "--no-memory"), "not allowed with"),
    ):
        code, _, error = flexolmo(*common, "--out", tmp_path / "out", *given)
        assert code == 2 and said in error, error


def test_a_model_merged_before_there_was_a_memory_has_none(copied):
    from flexolmo_jax.federation.package import read_manifest, write_manifest

    manifest = read_manifest(copied.merged)
    del manifest["memory"]
    write_manifest(copied.merged, manifest)
    assert fo.load(copied.merged).config.memory is None


def test_an_anchor_has_no_memory(world):
    config = world.config("anchor")
    with pytest.raises(ValueError, match="model.memory is for merged models"):
        dataclasses.replace(config, model=config.model.replace(memory=MEMORY))
