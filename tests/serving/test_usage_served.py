"""A running server keeps a usage ledger."""

import asyncio
import dataclasses
import math
import time
import types

import numpy as np
import pytest

from flexolmo_jax.model import load
from flexolmo_jax.serving import usage
from flexolmo_jax.usage import excerpts, report
from flexolmo_jax.usage.counterfactual import counterfactual
from flexolmo_jax.usage.ledger import replay
from flexolmo_jax.usage.signing import make_keys, read_public


def wait_for(is_there):
    deadline = time.monotonic() + 20
    while not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lines_of(file):
    seen = []
    replay(file, seen.append)
    return seen


def test_finished_requests_are_recorded_and_sampled(serving, world, tmp_path):
    file, secret = tmp_path / "usage.jsonl", tmp_path / "key"
    key = read_public(make_keys(secret))
    own = {"usage": file, "usage_key": secret, "counterfactual": 1.0, "length": 64}
    with serving(world.merged, **own) as server:
        body = {"prompt": [5, 6, 7], "max_tokens": 6, "seed": 1, "temperature": 1}
        body |= {"expert_mass": "request", "logit_bias": {"0": -100}}
        [choice] = server.choices(**body)
        server.choices(prompt="Once", max_tokens=3, n=2, experts={"without": ["code"]})
        server.choices(prompt="Once", max_tokens=0, echo=True)  # generates nothing
        wait_for(lambda: len(lines_of(file)) == 5)
        assert {x["kind"] for x in lines_of(file)} == {"use", "sample"}
        server.choices(prompt="The end", max_tokens=2)  # is written as the server ends
    contents = excerpts.verify_ledger(file, key)
    lines = lines_of(file)
    uses = [x for x in lines if x["kind"] == "use"]
    assert [(x["prompt_tokens"], x["tokens"]) for x in uses[:1]] == [(3, 6)]
    assert len(uses) == 3 and uses[1]["tokens"] <= 6 and "code" not in uses[1]["mass"]
    assert abs(sum(uses[0]["mass"].values()) - 6) < 1e-3
    for name, share in choice["expert_mass"].items():
        assert abs(uses[0]["mass"][name] / 6 - share) < 1e-3
    assert all(x["model"] == usage.digest_of(world.merged) for x in lines)
    assert not any(word in file.read_text() for word in ("Once", "end", "anybody"))
    assert contents.states["math"].requests == 3
    first = next(x for x in lines if x["kind"] == "sample")
    assert first["tokens"] == 6 and first["bits"].keys() == {"public", "math", "code"}
    assert report.read_report(file).requests == 3


def test_names_of_keys_are_recorded_only_if_that_is_wanted(serving, world, tmp_path):
    make_keys(tmp_path / "key")
    file = tmp_path / "usage.jsonl"
    own = {"usage": file, "usage_key": tmp_path / "key", "usage_askers": True, "length": 64}
    with serving(world.merged, **own) as server:
        server.choices(prompt="Once", max_tokens=2)
    assert [(x["kind"], x["asker"]) for x in lines_of(file)] == [("use", "anybody")]


def test_no_counterfactual_runs_an_expert_that_was_withdrawn_meanwhile(serving, world, tmp_path):
    make_keys(tmp_path / "key")
    file = tmp_path / "usage.jsonl"
    own = {"usage": file, "usage_key": tmp_path / "key", "counterfactual": 1.0, "length": 64}
    with serving(world.merged, **own) as server:
        service = server.service
        slots, service.runner.slots = service.runner.slots, 0  # so that it waits for one
        server.choices(prompt="Once", max_tokens=2)
        service.sources = dataclasses.replace(service.sources, withdrawn=frozenset({"math"}))
        service.runner.slots = slots
        server.choices(prompt="Once", max_tokens=3)
        wait_for(lambda: any(x["kind"] == "sample" for x in lines_of(file)))
    assert [(x["kind"], x["tokens"]) for x in lines_of(file)] == [
        ("use", 2), ("use", 3), ("sample", 3),
    ]  # fmt: skip
    assert all("math" not in x["mass"] for x in lines_of(file)[1:])


def test_the_counterfactual_is_that_of_two_forward_passes(world):
    model = load(world.merged)
    prompt, answer, mask = [5, 6, 7], [8, 9, 10, 11], np.ones(3, bool)
    engine = model.engine(slots=1, length=64)
    found = counterfactual(engine, prompt, answer, mask, np.array([1.0, 0.0, 2.0]))
    assert found.keys() == {0, 2}

    def bits(without):
        scores = model.log_likelihoods([[*prompt, *answer]], without=without)
        return scores.log_probabilities[0, len(prompt) - 1 :].sum() / math.log(2)

    for expert, own in found.items():
        expected = (bits([]) - bits([model.expert_names[expert]])) / len(answer)
        assert abs(own - expected) < 1e-4
    alone = np.array([True, False, False])
    assert counterfactual(engine, prompt, answer, alone, np.array([4.0, 0, 0])) == {}


def test_what_cannot_be_recorded_is_one_line(refused, world, tmp_path):
    serve = ("serve", "--model", world.merged, "--port", 0)
    ledger, secret = tmp_path / "usage.jsonl", tmp_path / "key"
    public = make_keys(secret)
    assert "--usage-key FILE" in refused(*serve, "--usage", ledger)
    assert "needs --usage LEDGER" in refused(*serve, "--usage-key", secret)
    assert "needs --usage LEDGER" in refused(*serve, "--counterfactual", "0.1")
    assert "expected 0 to 1" in refused(*serve, "--counterfactual", "nan")
    assert "expected a private key" in refused(*serve, "--usage", ledger, "--usage-key", public)
    ledger.write_text("my shopping list\n")
    assert "append-only log" in refused(*serve, "--usage", ledger, "--usage-key", secret)


def test_counterfactuals_begin_where_experts_are_padded_for_a_mesh():
    asked = []
    model = types.SimpleNamespace(expert_names=("a", "b", "c"), allowed=lambda n: np.ones((n, 4)))

    def start(request, events):
        asked.append(request.allowed.shape)
        events.put_nowait("length")
        return types.SimpleNamespace(has_ended=True)

    runner = types.SimpleNamespace(model=model, length=8, start=start)
    ledger = types.SimpleNamespace(contents=types.SimpleNamespace(unsigned=0), close=lambda: None)
    ledger.checkpoint = lambda: None
    made = usage.Usage(ledger, runner, lambda: None, "", 0.5, False)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(made.watch(), 0.3))
    made.close()
    assert set(asked) == {(3,)}
