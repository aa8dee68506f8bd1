"""`flexolmo serve` in two processes of two devices each: requests come to the first."""

import json
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

from flexolmo_jax.model import load

SETTINGS = {"JAX_NUM_CPU_DEVICES": "2", "COLUMNS": "200"}


@pytest.fixture
def processes(copied, tmp_path):
    """The two processes, and the address of the server."""
    with socket.create_server(("localhost", 0)) as free:
        meeting = f"localhost:{free.getsockname()[1]}"
    words = ["--model", copied.merged, "--port", 0, "--name", "ours", "--slots", 4, "--length", 200]
    words += ["--expert-parallel", 2, "--coordinator", meeting, "--processes", 2]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "flexolmo_jax", "serve", *map(str, [*words, "--process", i])],
            stdout=subprocess.PIPE, stderr=(tmp_path / f"log{i}").open("w"), text=True,
            env={**os.environ, **SETTINGS},
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        for line in started[0].stdout:
            if url := re.search(r"http://\S+:\d+", line):
                break
        else:
            pytest.fail((tmp_path / "log0").read_text() + (tmp_path / "log1").read_text())
        yield started, url[0]
    finally:
        for process in started:
            process.kill()
            process.wait()


def complete(url, **body):
    body = {"model": "ours", "temperature": 0, "max_tokens": 12, **body}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def test_they_answer_as_one_does(copied, processes):
    started, url = processes
    plain, prompts = load(copied.merged), ["one", "and the other " * 20, "a"]
    expected = plain.generate(prompts, 12, without=["math"])
    found = {}

    def ask(prompt):
        found[prompt] = complete(url, prompt=prompt, experts={"without": ["math"]}).text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [json.loads(found[prompt])["choices"][0]["text"] for prompt in prompts]
    assert made == expected
    time.sleep(2.5)  # they wait together

    command = ["experts", "remove", copied.merged, "math"]
    subprocess.run([sys.executable, "-m", "flexolmo_jax", *map(str, command)], check=True)
    served = {}
    for _ in range(300):  # until both have loaded the model without it
        served = httpx.get(f"{url}/v1/models").json()
        if "math" not in json.dumps(served):
            break
        time.sleep(0.1)
    assert complete(url, prompt="a", experts={"without": ["math"]}).status_code == 410
    [expected] = load(copied.merged).generate(["one"], 12)
    assert complete(url, prompt="one").json()["choices"][0]["text"] == expected

    for process in started:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in started] == [0, 0] or started[0].returncode < 0
