"""Few requests: a layer is one program; and of one that is alone, a token is read ahead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.inference import layerwise
from flexolmo_jax.inference.request import Request
from flexolmo_jax.inference.sampling import Sampling
from flexolmo_jax.model import load
from flexolmo_jax.modeling.kernels.quantized import quantize

LENGTH = 200
FORMS = "float32", "bfloat16", "int8"
MASKS = [True, True, True], [True, False, True], [False, True, False]


def requests(count=6, stop=(7,)):
    """With other prompts, masks, biases and ways of sampling; all give scores."""
    rng, samplings = np.random.default_rng(0), (Sampling(), Sampling(0.9), Sampling(1.0, None, 0.8))
    for number in range(count):
        yield Request(
            rng.integers(3, 300, [1, 20, 40][number % 3]).tolist(), 1 + 5 * number,
            np.array(MASKS[number % 3]), stop, samplings[number // 2], 3, number,
            bias={11: 2.0} if number % 2 else {}, scored=True,
        )  # fmt: skip


def run(engine, requests):
    requests = list(requests)
    for request in requests:
        engine.add(request)
    while engine.step():
        pass
    return requests


def step_by_step(model, monkeypatch, slots=1):
    """An engine that has a program for each expert, and waits for each token."""
    monkeypatch.setattr(layerwise, "MAX_BRANCHES", 0)
    engine = model.engine(slots, LENGTH)
    assert not engine._reads_ahead
    return engine


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize(
    ("form", "routing"), [*((form, "router") for form in FORMS), ("float32", "memory"),
    ("float32", "evidence")],
)  # fmt: skip
def test_a_layer_in_one_program_gives_what_many_programs_give(
    world, routed_by, form, routing, slots, monkeypatch
):
    model = routed_by(load(world.merged, dtype=form), routing)
    engine = model.engine(slots, LENGTH)
    assert engine._network.reads_in_background(slots) and engine._reads_ahead == (slots == 1)
    made = run(engine, requests())
    expected = run(step_by_step(model, monkeypatch, slots), requests())
    for one, other in zip(made, expected, strict=True):
        assert one.generated == other.generated and one.ended == other.ended
        np.testing.assert_allclose(one.shares, other.shares, atol=1e-5)
        for found, obvious in zip(one.scores, other.scores, strict=True):
            np.testing.assert_allclose(found.own, obvious.own, atol=1e-3)


def test_a_request_that_ended_leaves_nothing_to_the_next(world, monkeypatch):
    """A token was read ahead of one that stopped, and of one that was cancelled."""
    model = load(world.merged)
    expected = run(step_by_step(model, monkeypatch), requests(stop=()))
    monkeypatch.undo()
    engine = model.engine(1, LENGTH)
    stop = expected[4].generated[3]
    for number, request in enumerate(requests(stop=())):
        ends = number == 4
        first = dataclasses.replace(request, stop=(stop,), max_new_tokens=21) if ends else request
        again = dataclasses.replace(request, max_new_tokens=30)
        engine.add(first)
        while engine.step():
            pass
        engine.add(again)
        for _ in range(3):
            engine.step()
        engine.cancel(again)
        whole = expected[number].generated
        assert first.generated == (whole[: whole.index(stop)] if ends else whole)
        assert first.ended == ("stop" if ends else "length")
        assert again.generated[: len(whole)] == whole[:3]


def test_no_token_is_read_ahead_of_the_last(world):
    engine, calls = load(world.merged).engine(1, LENGTH), []
    network = engine._network

    class Counted(type(network)):
        def __call__(self, tokens, *others):
            calls.append(tokens.ids.shape)
            return super().__call__(tokens, *others)

    network.__class__ = Counted
    (made,) = run(engine, [Request([5, 6, 7], 9, np.ones(3, bool))])
    assert len(made.generated) == 9 and calls == [(1, 16), *[(1, 1)] * 8]


def test_what_makes_the_row_of_a_product_is_not_computed_for_each_sum():
    """XLA would multiply silu(g) by u again for each of the numbers that the product has."""
    weight = quantize(jnp.ones((96, 64)), int8=True)
    options = layerwise.OPTIONS | layerwise.REORDERED_SUMS
    compiled = jax.jit(lambda w, g, u: w.matmul(jax.nn.silu(g) * u), compiler_options=options)
    program = compiled.lower(weight, *jnp.ones((2, 1, 96))).compile().as_text()
    loops = [computation for computation in program.split("\n\n") if " dot(" in computation]
    is_kept = jax.__version_info__ >= (0, 11)  # XLA of JAX 0.10 drops the barrier too early
    assert len(loops) == 1 and ("multiply(" in loops[0]) != is_kept
