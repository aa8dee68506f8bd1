"""The whole forward pass: masking, mixing, packing, recomputing, gradients, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.modeling.experts import join, moe, select
from flexolmo_jax.modeling.router import route
from flexolmo_jax.modeling.transformer import abstract_model, forward, num_parameters

BASE = ModelConfig(vocab_size=50, width=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=24)
BATCH, LENGTH = 3, 9
STEP = 1e-3  # of finite differences


def random_model(config, seed=0):
    """A backbone and a stack, with nothing left at 0 or 1 and routing that is decisive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        drawn = 0.3 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(
            1 + drawn if "norm" in name else -abs(drawn) if "bias" in name else drawn
        )

    return jax.tree_util.tree_map_with_path(draw, abstract_model(config))


def random_layer(config):
    """A stack without the layer axis, as a layer sees it, and something to feed it."""
    layer = jax.tree.map(lambda leaf: leaf[0], random_model(config)[1])
    return layer, jax.random.normal(jax.random.key(3), (BATCH, LENGTH, config.width))


def random_tokens(config, seed=0, shape=(BATCH, LENGTH)):
    return jax.random.randint(jax.random.key(seed + 1), shape, 0, config.vocab_size)


@functools.partial(jax.jit, static_argnames="config")
def run(backbone, stacks, tokens, config, segments=None, allowed=None):
    """Logits [B, S, V] and router logits [L, E, B, S]."""
    out = forward(backbone, stacks, tokens, config, segments=segments, allowed=allowed)
    return backbone.logits(out.hidden, config), out.router_logits


def mask(num_experts, *kept):
    """bool [B, E]: of each row, or of all, the experts that may be used."""
    rows = np.zeros((BATCH, num_experts), bool)
    for row in range(BATCH):
        rows[row, kept[row % len(kept)]] = True
    return rows


@jax.jit
def poisoned(experts, kept):
    """The stack with NaN in all that is not kept: whatever is there, nobody may see it."""
    lead = experts.router.bias.shape
    kept = jnp.broadcast_to(kept, lead)
    return jax.tree.map(
        lambda x: jnp.where(kept.reshape(lead + (1,) * (x.ndim - 2)), x, jnp.nan), experts
    )


MIXTURES = {  # (E, A, renormalize): the experts that are kept, in several ways
    (5, 3, False): [[1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3], [1, 4]],
    (3, 3, True): [[1, 2], [0, 2], [0, 1], [1]],
    (4, 1, True): [[1, 2, 3], [0, 1, 3]],
}


@pytest.mark.parametrize("memory", [None, (0.9, 1.0)], ids=["forgetful", "remembering"])
@pytest.mark.parametrize(
    ("mixture", "keeps"), MIXTURES.items(), ids=["3 of 5", "3 of 3, renormalized", "1 of 4"]
)
def test_a_masked_expert_equals_one_that_was_never_merged_bit_for_bit(mixture, keeps, memory):
    num_experts, active, renormalize = mixture
    config = BASE.replace(num_experts=num_experts, active_experts=active, renormalize=renormalize)
    config = config.replace(memory=memory)
    backbone, experts = random_model(config)
    tokens = random_tokens(config)
    everything = run(backbone, (experts,), tokens, config, allowed=mask(num_experts, slice(None)))
    compiled = run._cache_size()
    masked = []
    for kept in keeps:
        allowed = mask(num_experts, kept)
        logits = run(backbone, (experts,), tokens, config, allowed=allowed)[0]
        blind = run(backbone, (poisoned(experts, allowed[0]),), tokens, config, allowed=allowed)[0]
        np.testing.assert_array_equal(blind, logits)
        assert np.isfinite(logits).all() and not np.array_equal(logits, everything[0])
        masked.append(logits)
    # Rows of one batch may have masks of their own.
    mixed = run(backbone, (experts,), tokens, config, allowed=mask(num_experts, *keeps))[0]
    for row in range(BATCH):
        np.testing.assert_array_equal(mixed[row], masked[row % len(keeps)][row])
    assert run._cache_size() == compiled, "a mask must not compile anything"

    for kept, logits in zip(keeps, masked, strict=True):
        never = run(backbone, (select(experts, kept),), tokens, config)[0]
        np.testing.assert_array_equal(logits, never)


def test_stacks_side_by_side_are_the_merged_stack(split_model):
    config, (second, first, backbone, tokens) = split_model
    merged = join(first, second)
    together = run(backbone, (merged,), tokens, config)
    apart = run(backbone, (first, second), tokens, config)
    # Not bit for bit: XLA compiles a loop over a stack of one as no loop, and rounds otherwise.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * abs(b).max()), apart, together
    )
    jax.tree.map(np.testing.assert_array_equal, select(merged, [2]), second)


def naive_mixture(stack, x, allowed, active, renormalize):
    """One token at a time, in numpy float64: the definition. Returns [B, S, D]."""
    stack = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), stack)
    gate, up, down = (getattr(stack.feed_forward, n)[...] for n in ("gate", "up", "down"))
    rows, biases = stack.router.row[...], stack.router.bias[...]
    out = np.zeros(x.shape)
    for b, s in np.ndindex(x.shape[:2]):
        token = np.asarray(x[b, s], np.float64)
        logits = rows @ token + np.minimum(biases, 0)
        usable = [e for e in range(len(rows)) if allowed[b, e]]
        top = max(logits[e] for e in usable)
        weights = {e: np.exp(logits[e] - top) for e in usable}
        total = sum(weights.values())
        chosen = sorted(usable, key=lambda e: (-weights[e], e))[:active]
        if renormalize:
            total = sum(weights[e] for e in chosen)
        for e in chosen:
            before = token @ gate[e]
            hidden = before / (1 + np.exp(-before)) * (token @ up[e])
            out[b, s] += weights[e] / total * (hidden @ down[e])
    return out


@pytest.mark.parametrize(("active", "renormalize"), [(1, True), (2, False), (2, True), (4, False)])
def test_the_mixture_is_its_definition(active, renormalize):
    config = BASE.replace(num_experts=4, active_experts=active, renormalize=renormalize)
    layer, x = random_layer(config)
    allowed = jnp.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 1]], bool)
    apply = jax.jit(lambda *args: moe(*args, config))
    found, *_ = apply(x, (layer,), allowed)
    expected = naive_mixture(layer, x, allowed, active, renormalize)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    # Equal logits: still exactly A experts, the first ones.
    layer.router.row[...] = jnp.zeros_like(layer.router.row[...])
    layer.router.bias[...] = jnp.zeros_like(layer.router.bias[...])
    found, router_logits, *_ = apply(x, (layer,), allowed)
    expected = naive_mixture(layer, x, allowed, active, renormalize)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    weights = route(router_logits, allowed, active, renormalize)
    used = np.minimum(active, allowed.sum(axis=1))[:, None]
    np.testing.assert_array_equal((weights > 0).sum(axis=0), np.broadcast_to(used, x.shape[:2]))


def test_a_bias_can_only_hold_back():
    config = BASE.replace(num_experts=2)
    layer, x = random_layer(config)

    apply = jax.jit(lambda router, x: router(x))

    def logits(bias):
        layer.router.bias[...] = bias
        return apply(layer.router, x)

    none = logits(jnp.array([0.0, 0.0]))
    np.testing.assert_array_equal(logits(jnp.array([0.0, 7.0])), none)
    held_back = logits(jnp.array([0.0, -7.0]))
    np.testing.assert_array_equal(held_back[0], none[0])
    np.testing.assert_allclose(held_back[1], none[1] - 7, atol=1e-5)


@pytest.mark.parametrize("memory", [None, (0.9, 1.0)], ids=["forgetful", "remembering"])
def test_packed_documents_see_only_themselves(memory):
    config = BASE.replace(num_experts=3, active_experts=2, memory=memory)
    backbone, experts = random_model(config)
    tokens = random_tokens(config, shape=(2, 12))
    segments = jnp.array([[1] * 5 + [2] * 7, [0] * 3 + [4] * 4 + [3] * 5])  # 0 is padding
    packed = run(backbone, (experts,), tokens, config, segments=segments)[0]
    assert np.isfinite(packed).all()
    # Each document alone, moved to the front of its row.
    documents = [(0, 0, 5), (0, 5, 12), (1, 3, 7), (1, 7, 12)]
    alone = jnp.zeros((4, 12), tokens.dtype)
    for i, (row, start, stop) in enumerate(documents):
        alone = alone.at[i, : stop - start].set(tokens[row, start:stop])
    expected = run(backbone, (experts,), alone, config)[0]
    for i, (row, start, stop) in enumerate(documents):
        one = expected[i, : stop - start]
        difference = np.abs(packed[row, start:stop] - one).max()
        assert difference <= 1e-5 * np.abs(one).max()


def split_loss(second, first, backbone, tokens, config):
    """Cross-entropy of the next token, and a little of the router's logits."""
    out = forward(backbone, (first, second), tokens, config)
    scores = jax.nn.log_softmax(backbone.logits(out.hidden, config)[:, :-1])
    taken = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)
    return -taken.mean() + 1e-3 * (out.router_logits**2).mean()


@pytest.fixture(scope="module")
def split_model():
    config = BASE.replace(num_experts=3, active_experts=2)
    backbone, experts = random_model(config)
    return config, (select(experts, [2]), select(experts, [0, 1]), backbone, random_tokens(config))


gradient = jax.jit(jax.value_and_grad(split_loss), static_argnames="config")


def test_remat_and_bfloat16(split_model):
    config, args = split_model
    loss, grads = gradient(*args, config=config)
    for remat in ("matmuls", "wide_matmuls", "layer"):
        again, same = gradient(*args, config=config.replace(remat=remat))
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        jax.tree.map(lambda *x: np.testing.assert_allclose(*x, rtol=1e-4, atol=1e-6), same, grads)

    second, first, backbone, tokens = args
    logits = run(backbone, (first, second), tokens, config)[0]
    rounded = run(backbone, (first, second), tokens, config.replace(dtype="bfloat16"))[0]
    assert rounded.dtype == jnp.float32
    difference = np.linalg.norm(rounded - logits) / np.linalg.norm(logits)
    assert 0 < difference < 0.05, difference


def test_gradients_are_finite_differences(split_model):
    config, (second, *rest) = split_model
    _, grads = gradient(second, *rest, config=config)
    loss = jax.jit(split_loss, static_argnames="config")
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert len(leaves) == 5
    for number, (path, grad) in enumerate(leaves):
        # Along the gradient of one leaf, where the slope is largest.
        length = jnp.linalg.norm(grad)
        assert length > 0, path
        structure = jax.tree.structure(grads)
        along = [jnp.zeros_like(g) for _, g in leaves]
        along[number] = grad / length
        direction = jax.tree.unflatten(structure, along)
        above = jax.tree.map(lambda x, d: x + STEP * d, second, direction)
        below = jax.tree.map(lambda x, d: x - STEP * d, second, direction)
        slope = (loss(above, *rest, config=config) - loss(below, *rest, config=config)) / (2 * STEP)
        np.testing.assert_allclose(slope, length, rtol=1e-2, err_msg=str(path))


def product_shapes(jaxpr):
    """Shape of the result of every matrix product in a jaxpr, those inside loops included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from product_shapes(inner)


def test_what_is_frozen_gets_no_gradient(split_model):
    config, args = split_model
    c = config
    shapes = {  # of the gradient of a weight of one layer and one expert, dimensions sorted
        "feed-forward": tuple(sorted((c.width, c.ffn_width))),
        "router": (c.width,),
        "queries, output": tuple(sorted((c.width, c.num_heads, c.head_size))),
        "keys, values": tuple(sorted((c.width, c.kv_heads, c.head_size))),
        "head": tuple(sorted((c.width, c.vocab_size))),
    }

    def count(argnums):
        grad = jax.make_jaxpr(jax.grad(split_loss, argnums), static_argnums=4)(*args, config)
        found = [tuple(sorted(shape)) for shape in product_shapes(grad.jaxpr)]
        return {name: found.count(shape) for name, shape in shapes.items()}

    trained = {"feed-forward": 3, "router": 1, "queries, output": 0, "keys, values": 0, "head": 0}
    assert count((0,)) == trained
    # The counting is able to see the others.
    assert count((0, 1)) == trained | {"feed-forward": 6, "router": 2}
    everything = {"queries, output": 2, "keys, values": 2, "head": 1}
    assert count((0, 1, 2)) == trained | {"feed-forward": 6, "router": 2} | everything


def test_the_released_model_has_as_many_parameters():
    config = ModelConfig(
        vocab_size=100_352,
        width=4096,
        num_layers=32,
        num_heads=32,
        ffn_width=11_008,
        num_experts=7,
    )
    assert num_parameters(config) == 33_270_665_216
