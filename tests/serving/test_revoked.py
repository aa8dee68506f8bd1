"""A server of signed packages: what is revoked while it runs is not used any more."""

import datetime
import logging
import shutil
import threading
import time

import pytest

from flexolmo_jax.federation.merge import add_expert, merge, remove_expert
from flexolmo_jax.federation.package import Package
from flexolmo_jax.model import load
from flexolmo_jax.serving import signed
from flexolmo_jax.serving.keys import KEYS, Policy
from flexolmo_jax.trust import keys, log, registry_changes, trusted
from flexolmo_jax.trust.signatures import sign_package

PROMPT = "The theorem"
BODY = {"model": "ours", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}


class Coordinated:
    """A server over a signed model of the test's own, and what its coordinator does."""

    def __init__(self, server, world):
        self.server, self.world = server, world

    def log(self, event, **given):
        given.setdefault("reason", "of a poisoner")
        log.append(self.world.registry, self.key("cora"), event, **given)

    def key(self, name):
        return keys.read_private(self.world.key(name))

    def error(self, status, **body):
        answer = self.server.post(**{**BODY, **body})
        assert answer.status_code == status, answer.text
        return answer.json()["error"]

    @property
    def served(self):
        return self.server.service.sources.served


@pytest.fixture
def own(serving, signed_world):
    with serving(signed_world.merged, length=4000, require_signed=signed_world.registry) as server:
        yield Coordinated(server, signed_world)


def test_a_revoked_expert_is_not_used_any_more(own):
    """By name: requests in flight that may use it end, later ones cannot; then it is back."""
    server, world = own.server, own.world
    with_it, without = server.stream(), server.stream(experts={"without": ["math"]}, max_tokens=200)
    own.server.wait_until(lambda: with_it.text and without.text)
    own.log(log.REVOKED, expert="math")
    with_it.join(30)
    without.join(30)
    assert with_it.ended == "expert_withdrawn" and without.ended == "length"
    [expected] = load(world.merged).generate([PROMPT], 8, without=["math"])
    assert server.text(**BODY) == expected
    for experts in ({"only": ["math"]}, {"without": ["math"]}):
        error = own.error(410, experts=experts)
        assert error["code"] == "expert_revoked"
        assert error["message"].count("was revoked") == 1 and "of a poisoner" in error["message"]
    [whole, _] = server.get("/v1/models").json()["data"]
    assert whole["experts"] == ["public", "code"]
    assert server.text(**{**BODY, "model": "ours:without-math"}) == expected
    assert 'flexolmo_expert_revoked{expert="math"} 1.0' in server.get("/metrics").text
    assert server.get("/health").json() == {"status": "ok"}
    own.log(log.REINSTATED, expert="math")
    own.server.wait_until(lambda: "math" in own.served)
    assert server.text(**BODY) == load(world.merged).generate([PROMPT], 8)[0]
    assert "flexolmo_expert_revoked{" not in server.get("/metrics").text


@pytest.mark.parametrize("how", ["digest", "key", "rejected"])
def test_an_expert_is_revoked_by_its_digest_and_by_its_key(own, how):
    digest = Package.open(own.world.experts["math"]).digest
    match how:
        case "digest":
            own.log(log.REVOKED, package=digest)
        case "key":
            given = ("mia", "of a poisoner", own.key("root"))
            registry_changes.revoke_signer(own.world.registry, *given)
        case "rejected":
            own.log(log.REJECTED, expert="math", package=digest)
    own.server.wait_until(lambda: "math" not in own.served)
    assert "of a poisoner" in own.error(410, experts={"only": ["math"]})["message"]
    assert own.served == ("public", "code") and own.server.text(**BODY)


@pytest.mark.parametrize("part", ["anchor", "merged"])
def test_without_its_anchor_or_its_manifest_nothing_is_served(own, part):
    server = own.server
    running = server.stream(experts={"only": ["public"]})
    own.server.wait_until(lambda: running.text)
    own.log(log.REVOKED, package=Package.open(own.world.root / part).digest)
    running.join(30)
    assert running.ended == "expert_withdrawn" and own.served == ()
    error = own.error(503)
    assert error["code"] == "model_refused" and "of a poisoner" in error["message"]
    for path in ("/v1/models", "/ready", "/tokenizer_info"):
        assert "of a poisoner" in server.get(path).json()["error"]["message"]
    health = server.get("/health")
    assert health.status_code == 503 and "of a poisoner" in health.json()["reason"]
    assert "flexolmo_model_refused 1.0" in server.get("/metrics").text
    own.log(log.REINSTATED, package=Package.open(own.world.root / part).digest)
    own.server.wait_until(lambda: own.served)
    assert server.text(**BODY) and server.get("/ready").status_code == 200


def test_an_expired_registry_stops_it_and_a_renewed_one_lets_it_continue(own, monkeypatch):
    late = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3650)
    with monkeypatch.context() as patch:
        patch.setattr("flexolmo_jax.trust.trusted.utc_now", lambda: late)
        own.server.wait_until(lambda: not own.served)
        assert "expired on" in own.error(503)["message"]
    own.server.wait_until(lambda: own.served)
    assert own.server.text(**BODY)


def test_a_registry_that_goes_back_or_vanishes_stops_it(own, monkeypatch, caplog):
    """After a while, in which what was seen stays in force."""
    registry, kept = own.world.registry, own.world.root / "kept"
    own.log(log.REVOKED, expert="math")
    own.server.wait_until(lambda: own.served == ("public", "code"))
    shutil.copytree(registry, kept)
    with caplog.at_level(logging.ERROR, logger="flexolmo_jax.serving"):
        (registry / "log.jsonl").unlink()
        own.server.wait_until(lambda: "its log had 1 lines before" in caplog.text)
    assert own.served == ("public", "code") and own.server.text(**BODY)
    monkeypatch.setattr(signed, "GRACE", 0.0)
    own.server.wait_until(lambda: own.served == ())
    assert "its log had 1 lines before" in own.error(503)["message"]
    assert own.server.get("/health").status_code == 503
    shutil.rmtree(registry)
    own.server.wait_until(lambda: "lines before" not in own.error(503)["message"])
    with caplog.at_level(logging.INFO, logger="flexolmo_jax.serving"):
        shutil.copytree(kept, registry)
        own.server.wait_until(lambda: own.served == ("public", "code"))
    assert "the registry is verified again" in caplog.text


def test_requests_on_a_model_that_was_replaced_end_too(own, make_expert):
    """The owner sent another package, which was merged, and then the first one was revoked."""
    world, server = own.world, own.server
    digest = Package.open(world.experts["math"]).digest
    another = make_expert(world.root / "another", "math")
    sign_package(another, world.key("mia"))
    merge(world.anchor, [another, world.experts["code"]], world.root / "new", allow_share=None)
    running, other = server.stream(), server.stream(experts={"without": ["math"]})
    server.wait_until(lambda: running.text and other.text)
    before = server.service.model
    (world.root / "new" / "manifest.json").replace(world.merged / "manifest.json")
    sign_package(world.merged, world.key("cora"))
    server.wait_until(lambda: server.service.model is not before)
    assert running.is_alive()
    own.log(log.REVOKED, package=digest)
    running.join(30)
    assert running.ended == "expert_withdrawn" and "math" in own.served
    other.join(30)
    assert other.ended == "length"


def test_a_registry_that_does_not_answer_stops_it(own, monkeypatch):
    """As a disk of the network that hangs: what was revoked meanwhile is not known."""
    answers = threading.Event()
    read = trusted._read

    def wait(folder):
        answers.wait(60)
        return read(folder)

    monkeypatch.setattr(trusted, "_read", wait)
    monkeypatch.setattr(signed, "GRACE", 1.0)
    try:
        own.log(log.REVOKED, expert="math")
        own.server.wait_until(lambda: own.served == ())
        assert "takes too long" in own.error(503)["message"]
    finally:
        answers.set()
    own.server.wait_until(lambda: own.served == ("public", "code"))


def test_what_is_changed_is_served_once_it_is_signed(own, caplog):
    """A removal takes effect at once; the rest waits for the signature."""
    server, world = own.server, own.world
    own.log(log.REVOKED, expert="math")
    own.server.wait_until(lambda: "math" not in own.served)
    remove_expert(world.merged, "math")
    time.sleep(1.5)
    assert server.service.model.expert_names == ("public", "math", "code")
    with caplog.at_level(logging.INFO, logger="flexolmo_jax.serving"):
        sign_package(world.merged, world.key("cora"))
        own.server.wait_until(lambda: "now serving public, code" in caplog.text)
    assert "may be used again" not in caplog.text
    assert server.text(**BODY) == load(world.merged).generate([PROMPT], 8)[0]
    assert own.error(410, experts={"only": ["math"]})["code"] == "expert_withdrawn"
    add_expert(world.merged, world.experts["math"])
    sign_package(world.merged, world.key("cora"))
    time.sleep(1.5)
    assert server.service.model.expert_names == ("public", "code")  # it is revoked
    assert own.server.text(**BODY)


def test_a_key_that_needs_a_revoked_expert_has_no_answers(serving, signed_world):
    file = signed_world.root / "keys.json"
    guarded = KEYS.add(file, Policy("guarded", always_on=("public", "math")))
    other = KEYS.add(file, Policy("other"))
    settings = {"keys": file, "require_signed": signed_world.registry, "length": 4000}
    with serving(signed_world.merged, **settings) as server:
        assert server.post(key=guarded, **BODY).status_code == 200
        Coordinated(server, signed_world).log(log.REVOKED, expert="math")
        server.wait_until(lambda: "math" not in server.service.sources.served)
        answer = server.post(key=guarded, **BODY)
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "expert_always_on" and "of a poisoner" in error["message"]
        assert server.get("/v1/models", guarded).json()["data"] == []
        assert server.post(key=other, **BODY).status_code == 200
        remove_expert(signed_world.merged, "math")
        sign_package(signed_world.merged, signed_world.key("cora"))
        server.wait_until(lambda: "math" not in server.service.model.expert_names)
        assert server.post(key=guarded, **BODY).status_code == 503


def test_what_is_revoked_or_unsigned_is_not_served_at_all(signed_world, refused):
    serve = ("serve", "--model", signed_world.merged, "--port", 0)
    signature = signed_world.root / "merged.sig"
    text = signature.read_bytes()
    signature.unlink()
    wanted = ("--require-signed", signed_world.registry)
    assert "merged.sig: no signature there" in refused(*serve, *wanted)
    signature.write_bytes(text)
    cora = keys.read_private(signed_world.key("cora"))
    log.append(signed_world.registry, cora, log.REVOKED, expert="math", reason="of a poisoner")
    assert "of a poisoner" in refused(*serve, *wanted)
    assert "none" in refused(*serve, "--require-signed", signed_world.root / "none")
