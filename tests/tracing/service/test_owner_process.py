"""`flexolmo trace serve` as a process, and whatever strangers send to it."""

import collections
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from flexolmo_jax.storage import hash_chain
from flexolmo_jax.tracing.service import app
from flexolmo_jax.tracing.service.askers import KEYS, Asker


def test_it_ends_well_at_sigterm(clinic, certificates, common, flexolmo, refused, tmp_path):
    _, key, _ = flexolmo("trace", "keys", "add", tmp_path / "keys.json", "coordinator")
    assert "coordinator" in flexolmo("trace", "keys", "list", tmp_path / "keys.json")[1]
    (tmp_path / "policy.toml").write_text("level = 'ids'\nminimum_tokens = 2")
    words = ("--index", clinic, "--policy", tmp_path / "policy.toml", "--log", tmp_path / "log")
    tls = ("--keys", tmp_path / "keys.json", "--certificate", certificates[0][0])
    command = [sys.executable, "-m", "flexolmo_jax", "trace", "serve", *words, *tls, "--port", 0]
    command += ["--private-key", certificates[0][1]]
    with (tmp_path / "errors").open("w+") as errors:
        started = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
    try:
        url = re.search(r"https://\S+:\d+", started.stdout.readline())[0]
        url = url.replace("127.0.0.1", "localhost")
        header = {"Authorization": f"Bearer {key.strip()}"}
        with httpx.Client(verify=str(certificates[0][0]), headers=header) as client:
            assert client.post(f"{url}/v1/trace", json={"text": common}).json()["spans"]
            assert "answers with this log" in refused("trace", "serve", *words, "--port", 0)
            started.send_signal(signal.SIGTERM)
        assert started.wait(20) in (0, -signal.SIGTERM)
    finally:
        started.kill()
        started.wait()
    said = (tmp_path / "errors").read_text()
    assert "Traceback" not in said and '"asker": "coordinator"' in said and "aspirin" not in said
    assert flexolmo("trace", "log", tmp_path / "log")[0] == 0


def test_no_question_makes_it_fail(serve, common):
    statuses = collections.Counter()
    with serve(level="snippets", requests_per_minute=100_000, minimum_tokens=1) as owner:
        schema = schemathesis.openapi.from_url(f"{owner.url}/openapi.json")
        for found in schema.get_all_operations():

            @settings(
                max_examples=50,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=found.ok().as_strategy())
            def attempt(case):
                answer = case.call(timeout=30)
                case.validate_response(answer, checks=[not_a_server_error])
                statuses[case.path, answer.status_code] += 1

            attempt()
        for body in (b"", b"[" * 100_000, b"\xff", b"null", b'{"text": 1}', b'{"text": "a"} x'):
            json = {"Content-Type": "application/json"}
            answer = httpx.post(f"{owner.url}/v1/trace", content=body, headers=json)
            assert answer.status_code == 400 and answer.json()["error"]["message"]
        assert httpx.get(f"{owner.url}/v1/trace").status_code == 405
        assert httpx.get(f"{owner.url}/none").json()["error"]["message"]
        assert owner.spans(common)
    assert statuses["/v1/trace", 200] and not any(status >= 500 for _, status in statuses)


def test_a_body_that_does_not_come_is_not_waited_for(serve, common, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    with serve() as owner, socket.create_connection(("localhost", int(owner.url[17:]))) as slow:
        slow.sendall(
            b"POST /v1/trace HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        slow.settimeout(5)
        begun = time.monotonic()
        assert owner.spans(common)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408") and time.monotonic() - begun < 3


def test_a_long_search_ends(serve, common, monkeypatch):
    """And nothing waits for it that needs no search."""
    from flexolmo_jax.tracing.service import owner as module

    begun = threading.Event()

    def search(*_):
        begun.set()
        time.sleep(0.5)
        raise module.TooSlow

    monkeypatch.setattr(module, "disclose", search)
    with serve() as owner:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(owner.post(common)))
        asking.start()
        assert begun.wait(5)
        assert httpx.get(f"{owner.url}/health").elapsed.total_seconds() < 0.4
        asking.join(10)
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "too_slow"
    [line] = hash_chain.read(owner.folder / "log")
    assert line["tokens"] > 0 and line["spans"] == []  # it spends the day's budget, too


def test_a_key_that_is_removed_during_a_search_gets_no_answer(serve, common, monkeypatch, tmp_path):
    from flexolmo_jax.tracing.service import owner as module

    keys, disclose = tmp_path / "keys.json", module.disclose
    key = KEYS.add(keys, Asker("brief"))

    def search(*given):
        KEYS.remove(keys, "brief")
        return disclose(*given)

    monkeypatch.setattr(module, "disclose", search)
    with serve(keys=keys) as owner:
        assert owner.post(common, key=key).status_code == 401
        assert not (owner.folder / "log").exists()


@pytest.mark.parametrize("text", ['{"keys": ["x"]}', '{"keys": {"a": 1}}', "[" * 100_000])
def test_a_damaged_file_of_keys_is_named(serve, common, refused, tmp_path, text):
    keys = tmp_path / "keys.json"
    KEYS.add(keys, Asker("first"))
    with serve(keys=keys) as owner:
        keys.write_text(text)
        assert owner.post(common, key="fo-x").status_code == 503
    assert "keys.json" in refused("trace", "keys", "list", keys)
    serve = ("trace", "serve", "--index", "x", "--policy", "y", "--log", tmp_path / "no" / "log")
    assert "no such folder" in refused(*serve)


def test_a_client_that_hangs_up_in_its_body_is_no_failure(serve, common, caplog):
    with serve() as owner:
        with socket.create_connection(("localhost", int(owner.url[17:]))) as client:
            client.sendall(
                b"POST /v1/trace HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
        assert owner.spans(common)
        time.sleep(0.1)
    assert "a request failed" not in caplog.text
