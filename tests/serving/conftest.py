"""A server in a thread of its own, over a real socket."""

import contextlib
import dataclasses
import json
import socket
import threading
import time

import fastapi
import httpx
import pytest
import uvicorn

from flexolmo_jax.serving.app import make_app
from flexolmo_jax.serving.service import Service, Settings, load_served


@dataclasses.dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    service: Service

    def post(self, path="/v1/completions", key=None, **body) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60)

    def get(self, path, key=None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(self.url + path, headers=headers, timeout=60)

    def choices(self, **body) -> list[dict]:
        answer = self.post(**{"model": "ours", "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def text(self, **body) -> str:
        return self.choices(**body)[0]["text"]

    def stream(self, **body) -> "Stream":
        return Stream(self.url, **body)

    @staticmethod
    def wait_until(holds, seconds=30.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.01)


class Stream(threading.Thread):
    """Reads a long answer."""

    def __init__(self, url, **body):
        super().__init__(daemon=True)
        self.body = {
            "model": "ours",
            "prompt": "The theorem",
            "max_tokens": 3900,
            "stream": True,
            **body,
        }
        self.body |= {"temperature": 0, "logit_bias": {"0": -100}}
        self.url, self.text, self.ended = url, "", None
        self.start()

    def run(self):
        with httpx.stream("POST", self.url + "/v1/completions", json=self.body, timeout=60) as got:
            for line in got.iter_lines():
                if line.startswith("data: {"):
                    [choice] = json.loads(line[6:])["choices"]
                    self.text += choice["text"]
                    self.ended = choice["finish_reason"]


@contextlib.contextmanager
def _serving(path, **settings):
    """Serves a model as `ours`."""
    own = Settings(path, "ours", **{"slots": 4, **settings})
    app = make_app(own, load_served(own))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", app.state.service)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(world):
    """The world's merged model, for everybody."""
    with _serving(world.merged, profiles={"sums": ("public", "math")}) as server:
        yield server


@pytest.fixture(scope="session")
def serving():
    """with serving(path, **settings) as server: a server of one's own."""
    return _serving


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """A file of the owners math, code and history; a list of the texts that each was asked about.

    math finds the first three characters of every text. code never answers.
    """
    asked = {"math": []}
    app = fastapi.FastAPI()

    @app.post("/math/v1/trace")
    async def answer(request: fastapi.Request):
        text = (await request.json())["text"]
        asked["math"].append(text)
        place = {"document": "d7", "source": "a book", "licence": "CC0-1.0", "group": ""}
        span = {"start": 0, "stop": 3, "tokens": 2, "log_probability": -9.0, "count": 4,
                "passages": [{**place, "before": "before ", "after": " after"}]}  # fmt: skip
        return {"owner": "m", "level": "snippets", "tokens": 9, "spans": [span], "receipt": None}

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    silent = socket.create_server(("127.0.0.1", 0))
    urls = {
        "math": f"http://127.0.0.1:{port}/math",
        "code": f"http://127.0.0.1:{silent.getsockname()[1]}",
        "history": "http://127.0.0.1:9",
    }
    file = tmp_path_factory.mktemp("owners") / "owners.toml"
    tables = [f"[[owners]]\nname = '{name}'\nurl = '{url}'\n" for name, url in urls.items()]
    file.write_text("seconds = 1\n" + "".join(tables))
    yield file, asked
    silent.close()
    server.should_exit = True
    thread.join(10)
