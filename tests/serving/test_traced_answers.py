"""Answers with a trace: only owners whose experts may answer are asked; none is waited for."""

import json
import threading
import time
import types

import pytest

from flexolmo_jax.serving import traces
from flexolmo_jax.serving.keys import KEYS, Policy
from flexolmo_jax.storage.files import replace_file

PROMPT = "The theorem"


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    return tmp_path_factory.mktemp("traced") / "keys.json"


@pytest.fixture(scope="module")
def traced(serving, world, owners, keys_file):
    """A server that traces; its keys: of everybody, and of somebody who does not know code."""
    policies = Policy("all"), Policy("no-code", experts=("public", "math"))
    own = {policy.name: KEYS.add(keys_file, policy) for policy in policies}
    with serving(world.merged, keys=keys_file, trace_owners=owners[0]) as server:
        yield server, own


def ask(traced, name="no-code", **body):
    server, keys = traced
    body = {"model": "ours", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **body}
    return server.post(key=keys[name], **body)


def events(answer):
    return [json.loads(x[6:]) for x in answer.text.splitlines() if x.startswith("data: {")]


def test_an_answer_has_a_trace_on_demand(traced, owners):
    answer = ask(traced, trace=True, echo=True).json()
    trace, text = answer["trace"], answer["choices"][0]["text"].removeprefix(PROMPT)
    assert trace["text"] == text == owners[1]["math"][-1]
    [span] = trace["spans"]
    assert span["counts"] == {"math": 4} and span["passages"][0]["owner"] == "math"
    assert span["passages"][0]["match"] == text[:3] and span["passages"][0]["licence"] == "CC0-1.0"
    assert trace["asked"] == ["math"] and trace["missing"] == {}
    assert "trace" not in ask(traced).json()


def test_a_stream_ends_with_the_trace(traced):
    more = {"stream": True, "stream_options": {"include_usage": True}}
    *_, used, last = events(ask(traced, trace=True, **more))
    assert used["usage"]["completion_tokens"] == 8 and last["choices"] == []
    assert last["trace"]["spans"][0]["counts"] == {"math": 4}
    assert not any("trace" in event for event in events(ask(traced, **more)))


def test_a_key_does_not_learn_of_an_owner_that_it_may_not_use(traced):
    server, keys = traced
    assert "code" not in ask(traced, trace=True).text
    for name, expected in (("no-code", ["math"]), ("all", ["math", "code"])):
        listed = {x["id"]: x for x in server.get("/v1/models", keys[name]).json()["data"]}
        assert listed["ours"]["traces"] == expected  # history has no expert here
        assert listed["ours:without-math"]["traces"] == expected[1:]


def test_a_source_that_is_off_is_not_asked(traced, owners):
    before = len(owners[1]["math"])
    answer = ask(traced, trace=True, experts={"without": ["math"]}).json()
    assert answer["trace"]["asked"] == [] and answer["trace"]["spans"] == []
    assert len(owners[1]["math"]) == before


def test_a_slow_owner_blocks_nobody(traced):
    slow = []
    asking = threading.Thread(target=lambda: slow.append(ask(traced, "all", trace=True)))
    begun = time.monotonic()
    asking.start()
    time.sleep(0.2)
    for _ in range(5):
        assert ask(traced, "all").elapsed.total_seconds() < 0.8
    asking.join(10)
    assert time.monotonic() - begun < 5
    trace = slow[0].json()["trace"]
    assert trace["missing"] == {"code": "no answer within 1 s"} and trace["spans"]


def test_what_a_key_may_not_use_any_more_is_not_asked(traced, keys_file, owners):
    server, keys = traced
    number, good = ask(traced).json()["id"], keys_file.read_text()
    before = len(owners[1]["math"])
    replace_file(keys_file, good.replace('"math"', '"history"'))
    end = time.monotonic() + 20
    while "math" in server.get("/v1/models", keys["no-code"]).text:
        assert time.monotonic() < end
        time.sleep(0.05)
    found = server.post("/v1/trace", key=keys["no-code"], id=number).json()
    assert found["asked"] == [] and len(owners[1]["math"]) == before
    replace_file(keys_file, good)
    while "math" not in server.get("/v1/models", keys["no-code"]).text:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_answer_can_be_traced_afterwards_by_whoever_has_it(traced, monkeypatch):
    server, keys = traced
    answer = ask(traced).json()
    found = server.post("/v1/trace", key=keys["no-code"], id=answer["id"])
    assert found.json()["text"] == answer["choices"][0]["text"] and found.json()["spans"]
    assert server.post("/v1/trace", key=keys["all"], id=answer["id"]).status_code == 404
    assert server.post("/v1/trace", key=keys["all"], id="cmpl-1").status_code == 404
    assert server.post("/v1/trace", id=answer["id"]).status_code == 401
    later = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 601)
    monkeypatch.setattr(traces, "time", later)  # not the clock of the server's event loop
    assert server.post("/v1/trace", key=keys["no-code"], id=answer["id"]).status_code == 404


def test_an_owner_is_asked_once_about_an_answer(traced, owners):
    server, keys = traced
    answer = ask(traced, trace=True).json()
    before = len(owners[1]["math"])
    again = [server.post("/v1/trace", key=keys["no-code"], id=answer["id"]) for _ in range(3)]
    assert all(found.json() == answer["trace"] for found in again)
    assert len(owners[1]["math"]) == before


def test_the_oldest_answers_go_where_owners_say_much(traced, monkeypatch):
    server, keys = traced
    first, second = (ask(traced, trace=True).json() for _ in range(2))
    monkeypatch.setattr(traces, "BYTES", int(1.5 * len(json.dumps(second["trace"]))))
    numbers = second["id"], first["id"]
    assert server.post("/v1/trace", key=keys["no-code"], id=numbers[0]).status_code == 200
    assert server.post("/v1/trace", key=keys["no-code"], id=numbers[1]).status_code == 404


def test_what_cannot_be_traced_is_said(traced, served, owners):
    assert ask(traced, trace=True, n=2).json()["error"]["param"] == "trace"
    answer = served.post(model="ours", prompt=PROMPT, trace=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_traces")
    assert served.post("/v1/trace", id="x").json()["error"]["code"] == "no_traces"
    assert served.get("/v1/models").json()["data"][0]["traces"] == []
    good = owners[0].read_text()
    owners[0].write_text("[")
    answer = ask(traced, trace=True).json()
    assert traced[0].get("/v1/models", traced[1]["all"]).json()["data"][0]["traces"] == []
    owners[0].write_text(good)
    assert answer["choices"][0]["text"] and "owners" in answer["trace"]["error"]["message"]
    assert ask(traced, trace=True).json()["trace"]["spans"]
