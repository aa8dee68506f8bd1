"""Experts come and go while the server runs, and a client that goes frees its slot."""

import json
import time

import httpx
import pytest

from flexolmo_jax.federation.merge import add_expert, remove_expert
from flexolmo_jax.model import load

PROMPT = "The theorem"


@pytest.fixture
def own(serving, copied):
    """A server over a model that the test may change, and that model's folder."""
    with serving(copied.merged, length=4000) as server:
        yield server, copied


def test_a_withdrawn_expert_is_gone_at_once(own):
    server, world = own
    body = {"prompt": PROMPT, "max_tokens": 8}
    uses_it = server.stream()
    does_not = server.stream(experts={"without": ["code"]}, max_tokens=200)
    server.wait_until(lambda: uses_it.text and does_not.text)
    remove_expert(world.merged, "code")
    uses_it.join(30)
    does_not.join(30)
    assert uses_it.ended == "expert_withdrawn" and does_not.ended == "length"
    smaller = load(world.merged)
    server.wait_until(lambda: server.service.model.expert_names == smaller.expert_names)
    assert server.text(**body) == smaller.generate([PROMPT], 8)[0]
    for experts in ({"only": ["code"]}, {"without": ["code"]}):
        answer = server.post(model="ours", **body, experts=experts)
        assert answer.status_code == 410 and answer.json()["error"]["code"] == "expert_withdrawn"
    assert [x["id"] for x in server.get("/v1/models").json()["data"]] == [
        "ours", "ours:without-math",
    ]  # fmt: skip
    add_expert(world.merged, world.experts["code"])
    server.wait_until(lambda: "code" in server.service.sources.served)
    assert server.text(**body, model="ours:without-code") == smaller.generate([PROMPT], 8)[0]
    assert server.text(**body) == load(world.merged).generate([PROMPT], 8)[0]


def test_an_expert_is_added_and_requests_in_flight_end_as_they_began(own, make_expert, tmp_path):
    server, world = own
    before = server.stream(max_tokens=400)
    before.join(30)
    running = server.stream(max_tokens=400)
    server.wait_until(lambda: running.text)
    add_expert(world.merged, make_expert(tmp_path / "loud", "loud", seed=5), allow_share=None)
    server.wait_until(lambda: "loud" in server.service.sources.served)
    running.join(30)
    assert running.text == before.text and running.ended == "length"
    expected = load(world.merged).generate([PROMPT], 8)[0]
    assert server.text(prompt=PROMPT, max_tokens=8) == expected


def test_what_cannot_be_loaded_changes_nothing(own):
    server, world = own
    body = {"prompt": PROMPT, "max_tokens": 8}
    before = server.text(**body)
    manifest = world.merged / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace("math", "mash"))
    time.sleep(1.5)
    assert server.text(**body) == before and server.get("/health").status_code == 200
    manifest.unlink()
    time.sleep(1.5)
    assert server.text(**body) == before


def test_a_client_that_vanishes_frees_its_slot(own):
    server, _ = own
    runner = server.service.runner
    body = {"model": "ours", "prompt": PROMPT, "max_tokens": 3900, "logit_bias": {"0": -100}}
    with httpx.stream(
        "POST", server.url + "/v1/completions", json={**body, "stream": True, "n": 3}
    ) as answer:
        next(answer.iter_lines())
        assert runner.count == 3
    server.wait_until(lambda: runner.count == 0, 5)
    with pytest.raises(httpx.ReadTimeout):  # one that waits for the whole answer, too
        httpx.post(server.url + "/v1/completions", json=body, timeout=0.5)
    server.wait_until(lambda: runner.count == 0, 5)


def test_a_request_may_take_so_long(serving, copied):
    with serving(copied.merged, length=4000, seconds=0.3, waiting=2, slots=1) as server:
        body = {"model": "ours", "prompt": PROMPT, "max_tokens": 3900, "logit_bias": {"0": -100}}
        answer = server.post(**body).json()["choices"][0]
        assert answer["finish_reason"] == "timeout" and answer["text"]
        full = server.post(**body, n=4)
        assert full.status_code == 503 and full.headers["retry-after"]
        assert full.json()["error"]["code"] == "overloaded"


def test_a_failing_engine_is_told_and_replaced(own, monkeypatch):
    server, _ = own
    engine = server.service.runner._current[1]

    def fail(*_):
        raise RuntimeError("out of memory")

    for name in ("config", "num_experts", "empty"):
        setattr(fail, name, getattr(engine._network, name))
    monkeypatch.setattr(engine, "_network", fail)
    answer = server.post(model="ours", prompt=PROMPT)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_error"
    assert server.text(prompt=PROMPT, max_tokens=3)
    assert server.get("/health").status_code == 200


def test_metrics_and_logs_hold_no_text(own, caplog):
    server, _ = own
    with caplog.at_level("INFO", logger="flexolmo_jax.web.requests"):
        server.text(prompt="Xylophone secret", max_tokens=5)
        metrics = server.get("/metrics").text
    assert 'flexolmo_tokens_total{kind="generated"} 5.0' in metrics
    assert 'route="/v1/completions",status="200"' in metrics
    assert "flexolmo_first_token_seconds_count 1.0" in metrics
    shares = [float(x.split()[-1]) for x in metrics.splitlines() if x.startswith(
        "flexolmo_expert_tokens_total")]  # fmt: skip
    assert abs(sum(shares) - 5) < 0.01
    [line] = [json.loads(record.message) for record in caplog.records if "/v1" in record.message]
    assert line["completion_tokens"] == 5 and line["status"] == 200 and line["model"] == "ours"
    assert "Xylophone" not in metrics + caplog.text
