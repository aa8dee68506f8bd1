"""The command itself, as a process."""

import contextlib
import http.client
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

from flexolmo_jax.usage import excerpts
from flexolmo_jax.usage.signing import make_keys, read_public
from flexolmo_jax.web import listening


@pytest.fixture
def process(world, tmp_path):
    """`flexolmo serve` at a free port, and its address."""
    log = (tmp_path / "log").open("w+")
    make_keys(tmp_path / "key")
    words = ("--model", world.merged, "--port", "0", "--length", "3000", "--slots", "2")
    words += ("--usage", tmp_path / "usage.jsonl", "--usage-key", tmp_path / "key")
    started = subprocess.Popen(
        [sys.executable, "-m", "flexolmo_jax", "serve", *map(str, words)],
        stdout=subprocess.PIPE, stderr=log, text=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    try:
        line = started.stdout.readline()
        url = re.search(r"http://\S+:\d+", line)
        assert url, line + (tmp_path / "log").read_text()
        yield started, url[0], tmp_path / "log"
    finally:
        started.kill()
        started.wait()


def test_it_drains_at_sigterm(process, tmp_path):
    """What is in flight ends well and is in the usage ledger, and nothing new is taken."""
    started, url, log = process
    assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
    body = {"model": "merged", "prompt": "Once", "max_tokens": 1500, "logit_bias": {"0": -100}}
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
    )
    asking.start()
    while "in_flight 0.0" in httpx.get(f"{url}/metrics").text:
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) in (0, -signal.SIGTERM)
    asking.join(10)
    [answer] = answers
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1500
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/ready")
    used = excerpts.verify_ledger(tmp_path / "usage.jsonl", read_public(tmp_path / "key.pub"))
    assert used.states["math"].tokens == 1500
    text = log.read_text()
    assert "Traceback" not in text and "Once" not in text and '"completion_tokens": 1500' in text


def test_an_idle_connection_outlives_that_of_a_client(process):
    """httpx keeps idle connections for 5 s: one that the server closes just then is a reset."""
    connection = http.client.HTTPConnection(process[1].removeprefix("http://"))
    with contextlib.closing(connection):
        for wait in (5.5, 0):
            connection.request("GET", "/health")  # raises if the server has closed it
            with connection.getresponse() as answer:
                assert answer.status == 200 and answer.read()
            time.sleep(wait)


def test_no_token_waits_for_an_acknowledgement():
    with listening.listen("127.0.0.1", 0) as listener, socket.socket() as client:
        client.connect(listener.getsockname())
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_cannot_be_served_is_one_line(refused, world, tmp_path):
    serve = ("serve", "--model", world.merged, "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused("serve", "--model", world.merged, "--port", port)
    assert "no such folder" in refused("serve", "--model", tmp_path / "none", "--port", 0)
    assert "the model's experts are public, math, code" in refused(
        *serve, "--experts-as", "all=history"
    )
    assert "NAME=EXPERT" in refused(*serve, "--experts-as", "all")
    assert "keys add" in refused(*serve, "--keys", tmp_path / "none.json")
    assert "at least 1" in refused(*serve, "--slots", 0)
    assert "above 0" in refused(*serve, "--timeout", "nan")
    template = tmp_path / "template.jinja"
    template.write_text("{% for")
    assert "not a chat template" in refused(*serve, "--chat-template", template)
    assert "none.jinja" in refused(*serve, "--chat-template", tmp_path / "none.jinja")
