"""Keys: who may use which experts, and how much; nothing of what a key hides is shown."""

import dataclasses
import json
import time

import pytest

from flexolmo_jax.serving.keys import KEYS, Policy
from flexolmo_jax.web import keys

PROMPT = "The theorem"
POLICIES = (
    Policy("everything"),
    Policy("no-code", experts=("public", "math"), always_on=("public",), expert_mass="request"),
    Policy("slow", tokens_per_minute=20, expert_mass="none"),
    Policy("one", concurrency=1),
    Policy("nothing", experts=("history",)),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def key_of(file):
    return {policy.name: KEYS.add(file, policy) for policy in POLICIES}


@pytest.fixture(scope="module")
def guarded(serving, world, file, key_of):
    with serving(world.merged, keys=file, profiles={"sums": ("public", "math")}) as server:
        yield server


def refusal(answer):
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


def test_a_request_needs_a_known_key(guarded, key_of):
    for key in (None, "fo-wrong", key_of["everything"][:-1]):
        for answer in (
            guarded.get("/v1/models", key),
            guarded.post(key=key, model="ours", prompt=PROMPT),
        ):
            assert refusal(answer) == (401, None, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/health").status_code == guarded.get("/ready").status_code == 200
    answer = guarded.post(key=key_of["everything"], model="ours", prompt=PROMPT)
    assert answer.status_code == 200


def test_a_file_keeps_no_key(file, key_of):
    text = file.read_text()
    assert not any(key in text or key.removeprefix("fo-") in text for key in key_of.values())


def test_a_key_uses_its_experts_only(guarded, served, key_of):
    """The answer is the one without the others."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "model": "ours"}
    answer = guarded.post(key=key_of["no-code"], **body)
    assert answer.json()["choices"][0]["text"] == served.text(
        **{**body, "experts": {"without": ["code"]}}
    )
    for experts, expected in (
        ({"only": ["code"]}, (403, "experts.only", "not_permitted")),
        ({"only": ["nobody"]}, (400, "experts.only", "unknown_expert")),
        ({"only": ["math"]}, (403, "experts.only", "expert_always_on")),
        ({"without": ["public"]}, (403, "experts.without", "expert_always_on")),
    ):
        assert refusal(guarded.post(key=key_of["no-code"], **body, experts=experts)) == expected
    assert refusal(guarded.post(key=key_of["nothing"], **body)) == (403, "model", "not_permitted")


def test_a_key_sees_what_it_may_use_only(guarded, key_of):
    answer = guarded.get("/v1/models", key_of["no-code"])
    assert "code" not in answer.text
    listed = {entry["id"]: entry for entry in answer.json()["data"]}
    assert list(listed) == ["ours", "ours:without-math", "ours:sums"]
    assert listed["ours"]["experts"] == ["public", "math"]
    assert listed["ours"]["always_on"] == ["public"]
    body = {"prompt": PROMPT, "model": "ours:without-code"}
    assert refusal(guarded.post(key=key_of["no-code"], **body))[0] == 404
    shown = guarded.post(key=key_of["no-code"], model="ours:nothing", prompt=PROMPT)
    assert "code" not in shown.json()["error"]["message"]


def test_shares_of_experts_are_shown_as_far_as_the_key_permits(guarded, key_of):
    body = {"prompt": PROMPT, "max_tokens": 4, "model": "ours"}
    for name, mass, status in (
        ("everything", "token", 200),
        ("no-code", "token", 403),
        ("no-code", "request", 200),
        ("slow", "request", 403),
    ):
        answer = guarded.post(key=key_of[name], **body, expert_mass=mass)
        assert answer.status_code == status, (name, mass)


def test_metrics_name_experts_to_a_key_for_all_of_them_only(guarded, key_of):
    guarded.post(key=key_of["everything"], model="ours", prompt=PROMPT, max_tokens=3)
    assert guarded.get("/metrics").status_code == 401
    assert 'expert="code"' in guarded.get("/metrics", key_of["everything"]).text
    limited = guarded.get("/metrics", key_of["no-code"]).text
    assert "code" not in limited and "flexolmo_tokens_total" in limited


def test_a_request_that_cannot_start_is_not_counted(guarded, key_of, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(guarded.service.runner, "start", fail)
        body = {"model": "ours", "prompt": PROMPT}
        answer = guarded.post(key=key_of["one"], **body)
        assert answer.status_code == 500 and answer.json()["error"]["message"]
        assert answer.headers["x-request-id"]
    assert guarded.post(key=key_of["one"], **body).status_code == 200


def test_tokens_and_requests_are_limited(guarded, key_of):
    body = {"model": "ours", "prompt": [1, 2], "max_tokens": 10}
    first, second = (guarded.post(key=key_of["slow"], **body) for _ in range(2))
    assert first.status_code == 200
    assert refusal(second) == (429, None, "rate_limit_exceeded")
    assert 1 <= int(second.headers["retry-after"]) <= 60
    too_many = guarded.post(key=key_of["slow"], **{**body, "max_tokens": 19})
    assert refusal(too_many)[0] == 400
    meter = guarded.service._meters.setdefault("one", keys.Meter())
    meter.running += 1
    assert refusal(guarded.post(key=key_of["one"], **body)) == (429, None, "concurrency")
    meter.running -= 1
    assert guarded.post(key=key_of["one"], **body).status_code == 200


def test_unused_tokens_are_given_back(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = keys.Meter()
    assert meter.seconds_until(60, 60) == 0
    meter.begin(60)
    assert meter.seconds_until(30, 60) == 30
    meter.end(60, used=15)
    assert meter.seconds_until(30, 60) == 0
    now = 60.0
    assert meter.seconds_until(60, 60) == 0


def test_a_removed_key_ends_while_the_server_runs(guarded, file, key_of):
    key = KEYS.add(file, Policy("brief"))

    def status():
        return guarded.get("/v1/models", key).status_code

    def wait_for(wanted):
        end = time.monotonic() + 20
        while status() != wanted:
            assert time.monotonic() < end
            time.sleep(0.05)

    wait_for(200)
    KEYS.remove(file, "brief")
    wait_for(401)
    good = file.read_text()
    file.write_text("{")  # a damaged file changes nothing
    time.sleep(1.5)
    assert guarded.get("/v1/models", key_of["one"]).status_code == 200
    file.write_text(good)


def test_the_commands(flexolmo, refused, tmp_path):
    file = tmp_path / "keys.json"
    words = ("--experts", "public", "math", "--always-on", "public", "--concurrency", 2)
    code, key, said = flexolmo("keys", "add", file, "clinic", *words)
    assert code == 0 and key.startswith("fo-") and "clinic" in said
    [policy] = KEYS.read(file)
    assert policy == Policy(
        "clinic", keys.digest(key.strip()), ("public", "math"), ("public",), None, 2, "request"
    )
    assert "already" in refused("keys", "add", file, "clinic")
    code, shown, _ = flexolmo("keys", "list", file, "--json")
    assert json.loads(shown)[0]["experts"] == ["public", "math"]
    assert "public, math" in flexolmo("keys", "list", file)[1]
    assert "no key of 'other'" in refused("keys", "remove", file, "other")
    assert flexolmo("keys", "remove", file, "clinic")[0] == 0 and KEYS.read(file) == []
    assert "must stay on" in refused("keys", "add", file, "x", "--experts", "a", "--always-on", "b")
    assert "at least 1" in refused("keys", "add", file, "x", "--concurrency", 0)
    file.write_text(json.dumps({"keys": [{**dataclasses.asdict(policy), "experts": "public"}]}))
    assert "must be names" in refused("keys", "list", file)
    file.write_text(json.dumps({"keys": [{**dataclasses.asdict(policy), "admin": True}]}))
    assert "keys.json" in refused("keys", "list", file)
