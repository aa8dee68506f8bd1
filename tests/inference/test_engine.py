"""Many requests at a time: what each gets is what it gets alone, whoever else is there."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.inference import engine as engine_module
from flexolmo_jax.inference.compiled import CompiledNetwork
from flexolmo_jax.inference.engine import (
    CHUNKS,
    PROMPT_TOKENS_BETWEEN,
    SHARED_CHUNKS,
    Engine,
)
from flexolmo_jax.inference.layerwise import GATHER_SIZES, MAX_BEST, gathered_sizes
from flexolmo_jax.inference.request import Request
from flexolmo_jax.inference.sampling import Sampling
from flexolmo_jax.modeling.decode_state import SEGMENT
from flexolmo_jax.modeling.experts import FeedForward, router_weights, with_parts
from flexolmo_jax.modeling.transformer import forward

SLOTS, LENGTH = 4, 600
SAMPLINGS = (Sampling(), Sampling(0.9), Sampling(1.2, 20), Sampling(0.7, None, 0.8))


def requests_of(seed, count, num_experts):
    """Random prompts, lengths, masks and ways of sampling."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        prompt = rng.integers(3, 300, rng.choice([1, 5, 31, 32, 33, 129, 300])).tolist()
        allowed = rng.random(num_experts) < 0.6
        allowed[rng.integers(num_experts)] = True
        sampling = SAMPLINGS[rng.integers(len(SAMPLINGS))]
        yield Request(prompt, int(rng.integers(1, 12)), allowed, (7,), sampling, seed, number)


def run(engine, requests):
    for request in requests:
        engine.add(request)
    while engine.step():
        pass
    return [request.generated for request in requests]


@pytest.fixture(scope="module")
def alone(model):
    """What 24 requests get in an engine of four slots that each has to itself."""
    engine = model.engine(SLOTS, LENGTH)
    return [run(engine, [request])[0] for request in requests_of(0, 24, 4)]


@pytest.mark.parametrize("prefixes", [0, 6])
def test_tokens_do_not_depend_on_neighbours(model, alone, prefixes):
    """Random arrivals, masks, ways of sampling and cancellations, through reused slots."""
    engine, rng = model.engine(SLOTS, LENGTH, prefixes), np.random.default_rng(1)
    requests = list(requests_of(0, 24, 4))
    others = list(requests_of(5, 12, 4))
    order = [*requests, *others]
    rng.shuffle(order)
    while order or engine.step():
        for _ in range(min(rng.integers(3), len(order))):
            engine.add(order.pop())
        if others and rng.random() < 0.5:
            engine.cancel(others.pop())
    assert [request.generated for request in requests] == alone
    assert {request.ended for request in requests} <= {"stop", "length"}


@pytest.mark.parametrize("routing", ["router", "memory", "evidence"])
def test_tokens_do_not_depend_on_how_many_use_an_expert(model, routed_by, routing):
    """Experts read only the tokens that use them."""
    model = routed_by(model, routing)
    requests = list(requests_of(0, 12, 4))
    engine, rng, order = model.engine(12, LENGTH), np.random.default_rng(1), list(requests)
    engine._network._gathers_few = {12: False}
    alone = [run(model.engine(12, LENGTH), [one])[0] for one in requests_of(0, 12, 4)]
    engine._network._gathers_few = {}
    while order or engine.step():
        if order and rng.random() < 0.4:
            engine.add(order.pop())
    assert [request.generated for request in requests] == alone


def test_experts_read_few_tokens_only_if_their_bits_are_the_same(model):
    network = model._network(8)
    programs = network._programs
    assert network.gathers_few(8) is network.gathers_few(8)

    def inexact(networks, added, x, weights, firsts, tokens=None):
        made = programs.add[0](networks, added, x, weights, firsts, tokens)
        return made if tokens is None else made * (1 + 1e-6)

    network._programs = programs._replace(add=(inexact,) * len(programs.add))
    network._gathers_few.clear()
    assert network.gathers_few(8) is False and network.gathers_few(4) is True
    network._programs = programs
    network._gathers_few.clear()


@pytest.mark.parametrize("count", [1, 2, 4, 8, 12, 16, 64, 100, 512])
def test_few_sizes_of_gathered_tokens(count):
    sizes = gathered_sizes(count)
    assert sizes == sorted(set(sizes)) and sizes[-1] == count and len(sizes) <= GATHER_SIZES
    assert all(size >= 4 for size in sizes[:-1])


def test_one_compiled_program_gives_the_same_as_layer_by_layer(model, alone):
    """What accelerators run, with prompts that begin alike, scores and masks."""
    network = CompiledNetwork(model.backbone, model.experts, model.config, 4, None)
    engine = Engine(network, SLOTS, LENGTH, prefixes=4)
    requests = list(requests_of(0, 24, 4))
    assert run(engine, requests) == alone
    scored = [
        Request([*range(5, 40)], 3, np.ones(4, bool), scored=True, scores_prompt=True) for _ in "ab"
    ]
    run(engine, scored[:1])
    run(model.engine(SLOTS, LENGTH), scored[1:])
    for name in ("scores", "prompt_scores"):
        for one, other in zip(*(getattr(request, name) for request in scored), strict=True):
            np.testing.assert_allclose(one.own, other.own, atol=1e-4)
    np.testing.assert_allclose(scored[0].shares, scored[1].shares, atol=1e-5)


@pytest.mark.parametrize("slots", [SLOTS, 64])
def test_logits_are_those_of_a_request_that_is_alone_bit_for_bit(model, slots):
    """Among 64, XLA's matmuls of all rows and of some may differ."""
    wide = FeedForward(model.config.num_layers, 4, model.config.width, 1408, jax.random.key(0))
    experts = with_parts(model.experts, feed_forward=wide)
    model = dataclasses.replace(model, experts=experts)
    [request, *others] = requests_of(3, slots, 4)

    def last_logits(together):
        engine = model.engine(slots, LENGTH)
        own, *others = (
            dataclasses.replace(one, max_new_tokens=8, stop=()) for one in [request, *together]
        )
        own.sampling = Sampling()
        for one in [own, *others]:
            engine.add(one)
        while len(own.generated) < 6:
            engine.step()
        return np.asarray(engine._logits[engine._running.index(own)])

    np.testing.assert_array_equal(last_logits([]), last_logits(others))


def test_a_token_is_written_to_the_cache_in_place(model):
    network, compiled = model._network(1), []

    def layer(*args):
        compiled.append(network._programs.layer.lower(*args).compile().as_text())
        return network._programs.layer(*args)

    spied = copy.copy(network)
    spied._programs = network._programs._replace(layer=layer)
    run(Engine(spied, 1, 500), [Request([5, 6, 7], 2, np.ones(4, bool))])
    config, program = model.config, compiled[-1]
    segment = rf"f32\[1,{config.kv_heads},{SEGMENT},{config.head_size}\]"
    assert re.search(segment, program) and not re.search(rf"= {segment}\S* copy\(", program)


def test_a_slot_keeps_nothing_of_a_request_before(model):
    """Not even NaN, which an expert that another request may use has left there."""
    experts = jax.tree.map(jnp.array, model.experts)
    experts.feed_forward.up[...] = experts.feed_forward.up[...].at[:, 1].set(jnp.nan)
    broken = dataclasses.replace(model, experts=experts)
    without = np.array([True, False, True, True])
    expected = run(model.engine(2, LENGTH), [Request([5, 6, 7], 8, without)])
    engine = broken.engine(2, LENGTH)
    run(engine, [Request([9] * 300, 4, np.ones(4, bool)) for _ in range(3)])
    made = run(engine, [Request([5, 6, 7], 8, without), Request([9] * 300, 4, np.ones(4, bool))])
    assert made[0] == expected[0]


def test_prompts_that_begin_alike_are_read_once(model, monkeypatch):
    engine = model.engine(SLOTS, LENGTH, prefixes=4)
    beginning, mask = list(range(10, 10 + SHARED_CHUNKS[-1])), np.ones(4, bool)
    lengths = []
    network = engine._network

    def counting(tokens, *args):
        if tokens.ids.shape[1] > 1:
            lengths.append(int(tokens.lengths[0]))
        return network(tokens, *args)

    for name in ("config", "num_experts", "empty", "place"):
        setattr(counting, name, getattr(network, name))
    monkeypatch.setattr(engine, "_network", counting)
    first = run(engine, [Request([*beginning, 5, 6], 4, mask)])
    assert lengths == [SHARED_CHUNKS[-1], 2]
    again = run(engine, [Request([*beginning, 5, 6], 4, mask)])
    assert lengths == [SHARED_CHUNKS[-1], 2] and again == first
    run(engine, [Request([*beginning, 8], 4, mask)])
    assert lengths == [SHARED_CHUNKS[-1], 2, 1]
    masked = mask.copy()
    masked[1] = False
    made = run(engine, [Request([*beginning, 8], 4, masked)])  # other experts: nothing in common
    assert lengths == [SHARED_CHUNKS[-1], 2, 1, SHARED_CHUNKS[-1], 1]
    assert made == run(model.engine(SLOTS, LENGTH), [Request([*beginning, 8], 4, masked)])


def test_another_top_k_compiles_nothing_and_disturbs_nobody(model):
    samplings = [Sampling(1.0, k) for k in (1, 7, 40, 64)]
    requests = [Request([5, 6], 6, np.ones(4, bool), (), own, 3) for own in samplings]
    alone = [run(model.engine(4, 60), [dataclasses.replace(one)])[0] for one in requests]
    compiled = engine_module._draw._cache_size()
    assert run(model.engine(4, 60), requests) == alone
    assert run(model.engine(4, 60), [Request([5, 6], 6, np.ones(4, bool), (), Sampling(1.0, 33))])
    assert engine_module._draw._cache_size() == compiled
    greedy = Request([5, 6], 6, np.ones(4, bool))
    assert alone[0] == run(model.engine(4, 60), [greedy])[0]


def test_a_new_request_soon_has_its_first_token(model):
    engine, mask = model.engine(SLOTS, 700), np.ones(4, bool)
    others = [Request([3, 4], 50, mask) for _ in range(SLOTS - 1)]
    for other in others:
        engine.add(other)
    while not all(other.generated for other in others):
        engine.step()
    late = Request([9] * 512, 4, mask)
    engine.add(late)
    steps = 0
    while not late.generated:
        engine.step()
        steps += 1
    assert steps <= 3


@pytest.mark.parametrize("prefixes", [0, 4])
def test_running_requests_wait_for_few_tokens_of_prompts(model, monkeypatch, prefixes):
    """However short and long ones follow each other."""
    engine, read, most = model.engine(8, LENGTH, prefixes), 0, 0
    read_chunk, read_tokens = engine._read_chunk, engine._read_tokens

    def counting(reading, chunk):
        nonlocal read
        read += chunk
        return read_chunk(reading, chunk)

    def decoding():
        nonlocal read, most
        most, read = max(most, read), 0
        return read_tokens()

    monkeypatch.setattr(engine, "_read_chunk", counting)
    monkeypatch.setattr(engine, "_read_tokens", decoding)
    for length in (5, 500, 100, 31, 400, 130, 7, 300):
        engine.add(Request([9] * length, 2, np.ones(4, bool)))
    while engine.step():
        pass
    assert 0 < most <= PROMPT_TOKENS_BETWEEN


@pytest.mark.parametrize(
    ("length", "chunks"),
    [
        (10, [16]),
        (30, [32]),
        (40, [128]),
        (130, [128, 16]),
        (256, [128] * 2),
        (257, [512]),
        (580, [512, 128]),
    ],
)
def test_a_prompt_is_read_in_few_chunks_with_little_padding(model, monkeypatch, length, chunks):
    engine, read = model.engine(SLOTS, LENGTH), []
    read_chunk = engine._read_chunk

    def listing(reading, chunk):
        read.append(chunk)
        return read_chunk(reading, chunk)

    monkeypatch.setattr(engine, "_read_chunk", listing)
    run(engine, [Request([9] * length, 1, np.ones(4, bool))])
    assert read == chunks


def test_a_first_token_waits_for_no_other_prompt(model):
    """Of requests that come together, each has its own as soon as its prompt is read."""
    engine = model.engine(SLOTS, LENGTH)
    requests = [Request([9] * length, 4, np.ones(4, bool)) for length in (5, 500, 100)]
    for request in requests:
        engine.add(request)
    engine.step()
    assert [len(request.generated) for request in requests] == [1, 0, 0]


def test_tokens_are_handed_out_as_they_come_and_cancelling_frees_a_slot(model):
    engine, mask, seen = model.engine(1, LENGTH), np.ones(4, bool), []
    long = Request([3, 4], 100, mask, on_token=seen.append)
    next_one = Request([3, 4], 2, mask)
    engine.add(long)
    engine.add(next_one)
    for count in range(1, 6):
        engine.step()
        assert seen == long.generated and len(seen) == count
    engine.cancel(long)
    while engine.step():
        pass
    assert long.ended == "cancelled" and len(seen) == 5
    assert next_one.ended == "length" and next_one.generated == seen[:2]


def test_a_model_makes_requests_of_texts_and_names(model):
    text, options = "The theorem", {"temperature": 0.9, "top_k": 30, "seed": 4}
    engine = model.engine(SLOTS, LENGTH)
    requests = [
        model.request(text, 8, without=["loud"], **options),
        model.request([0, 5, 6], 8, only=["public"], seed=1),
    ]
    made = run(engine, requests)
    ids = model.tokenizer.encode_prompt(text)
    assert made[0] == model.generate([ids], 8, without=["loud"], **options)[0]
    assert made[1] == model.generate([[0, 5, 6]], 8, only=["public"])[0]
    with pytest.raises(ValueError, match="no expert named 'maths'"):
        model.request(text, without=["maths"])


def test_scores_are_log_probabilities_of_the_models_logits(model):
    """Of a prompt longer than a chunk, and of new tokens, whatever bias and temperature."""
    prompt = [5 + i % 500 for i in range(CHUNKS[-1] + 40)]
    mask = np.array([True, False, True, True])
    options = {"sampling": Sampling(0.9), "bias": {9: 3.0}, "scored": True, "scores_prompt": True}
    request = Request(prompt, 5, mask, **options)
    run(model.engine(2, LENGTH), [request, Request([3, 4], 20, mask)])
    ids = [*prompt, *request.generated]
    logits = model.logits([ids], allowed=mask)[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    found = [*request.prompt_scores, *request.scores]
    assert len(found) == len(ids) - 1
    for at, own in enumerate(found):
        np.testing.assert_allclose(own.own, expected[at, ids[at + 1]], atol=2e-5)
        np.testing.assert_allclose(own.best, np.sort(expected[at])[::-1][:MAX_BEST], atol=2e-5)
        np.testing.assert_array_equal(own.best, -np.sort(-own.best))
        np.testing.assert_allclose(expected[at, own.best_ids], own.best, atol=2e-5)


def test_a_prompt_can_be_scored_alone(model):
    mask = np.ones(4, bool)
    request = Request([5, 6, 7], 0, mask, scores_prompt=True)
    assert run(model.engine(1, LENGTH), [request]) == [[]]
    assert request.ended == "length" and len(request.prompt_scores) == 2


def test_biases_change_the_choice_of_their_own_request_only(model):
    mask = np.ones(4, bool)
    plain = run(model.engine(2, LENGTH), [Request([5, 6, 7], 6, mask)])[0]
    biased = Request([5, 6, 7], 6, mask, bias={11: 100.0})
    banned = Request([5, 6, 7], 1, mask, bias={plain[0]: -100.0})
    made = run(model.engine(3, LENGTH), [biased, Request([5, 6, 7], 6, mask), banned])
    assert made[:2] == [[11] * 6, plain] and made[2] != plain[:1]


def test_shares_are_the_router_weights_at_the_token_before(model):
    mask = np.array([True, True, False, True])
    request = Request([5, 6, 7], 4, mask)
    run(model.engine(2, LENGTH), [Request([9] * 40, 8, ~mask), request])
    for count, shares in enumerate(request.shares):
        ids = jnp.array([[5, 6, 7, *request.generated[:count]]])
        out = forward(model.backbone, (model.experts,), ids, model.config, allowed=mask)
        weights = [router_weights(x, mask[None], model.config)[0] for x in out.router_logits]
        np.testing.assert_allclose(shares, np.mean(weights, axis=0)[:, 0, -1], atol=1e-6)
        assert shares[2] == 0 and abs(shares.sum() - 1) < 1e-5


def test_what_an_engine_cannot_do_is_one_clear_error(model):
    engine, mask = model.engine(2, 64), np.ones(4, bool)
    for request, said in (
        (Request([], 3, mask), "needs a prompt"),
        (Request([1] * 60, 5, mask), "at most 64 tokens together; found 60 and 5"),
        (Request([1], 0, mask), "at least one new token"),
        (Request([1], 1, ~mask), "at least one expert"),
        (Request([1], 1, mask[:3]), r"allowed must be bool \[4\]"),
        (Request([1, 512], 1, mask), r"tokens in \[0, 512\), the vocabulary; found 1 to 512"),
        (Request([1], 1, mask, sampling=Sampling(-1.0)), "temperature"),
        (Request([1], 1, mask, bias={512: 1.0}), r"tokens in \[0, 512\)"),
        (Request([1], 1, mask, bias=dict.fromkeys(range(301), 1.0)), "at most 300 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.add(request)
    assert not engine.step()
