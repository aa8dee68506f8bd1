"""An owner's documents, their index, and services over real sockets."""

import asyncio
import contextlib
import dataclasses
import json
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flexolmo_jax.storage.files import replace_file
from flexolmo_jax.tracing.build import build_index
from flexolmo_jax.tracing.service.app import make_app
from flexolmo_jax.tracing.service.ask import ask
from flexolmo_jax.tracing.service.owner import Settings
from flexolmo_jax.tracing.service.owners import Address

COMMON = "the patient was given aspirin twice a day"  # in the documents 0 to 4
SECRET = "the patient was given aspirin twice a day by Nurse Ratched in ward nine"  # in 0 only
TEXTS = [
    f"Report zero: {SECRET} before noon.",
    *(f"Report {name}: {COMMON} and slept well." for name in ("one", "two", "three", "four")),
    "Nothing of this is said in the sixth report, which is about the weather.",
]


@dataclasses.dataclass(frozen=True)
class Running:
    """A service that runs."""

    url: str
    folder: Path  # of its files: index, policy.toml, log

    def post(self, text, key=None, **more) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        body = json.dumps({"text": text, **more})  # in ASCII, also where it is no UTF-8
        return httpx.post(f"{self.url}/v1/trace", content=body, headers=headers, timeout=30)

    def spans(self, text, **more) -> dict[str, dict]:
        """What is said of a text: its spans by their words."""
        answer = self.post(text, **more)
        assert answer.status_code == 200, answer.text
        return {text[s["start"] : s["stop"]]: s for s in answer.json()["spans"]}

    def says(self, **policy) -> "Running":
        """Changes the policy while it runs."""
        write_policy(self.folder / "policy.toml", **policy)
        return self

    def address(self, name="clinic", **more) -> Address:
        return Address(name, self.url, **more)


def write_policy(file: Path, **policy) -> None:
    fields = {"level": "counts", "minimum_tokens": 2, "minimum_documents": 2, **policy}
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    replace_file(file, "\n".join(lines) + "\n")


@contextlib.contextmanager
def running(app, tls=None):
    """Runs an application; its address."""
    files = {} if tls is None else {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]}
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on", **files))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"{'https' if tls else 'http'}://localhost:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Path:
    """A tokenizer whose tokens are bytes and frequent words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.fixture(scope="session")
def indexed(words, tmp_path_factory):
    """indexed(texts, owner="clinic"): the folder of a new index of documents `id`: "d0", ..."""

    def build(texts, owner="clinic", **fields) -> Path:
        folder = tmp_path_factory.mktemp("index")
        rows = [{"text": text, "id": f"d{i}", **fields} for i, text in enumerate(texts)]
        source = folder / "source.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        build_index([str(source)], words, folder / "index", owner)
        return folder / "index"

    return build


@pytest.fixture(scope="session")
def clinic(indexed):
    """The index of `TEXTS`; nobody changes it."""
    return indexed(TEXTS, licence="CC0-1.0", source="https://clinic.example")


@pytest.fixture
def serve(clinic, tmp_path):
    """with serve(level=..., ...) as service: a service with this policy, over HTTP."""

    @contextlib.contextmanager
    def begin(index=None, keys=None, log=True, tls=None, **policy):
        folder = tmp_path / f"owner{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shutil.copytree(index or clinic, folder / "index")
        write_policy(folder / "policy.toml", **policy)
        settings = Settings(
            folder / "index", folder / "policy.toml", keys, folder / "log" if log else None
        )
        with running(make_app(settings), tls) as url:
            yield Running(url, folder)

    return begin


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Two self-made certificates for localhost, each with its key: pairs of files."""
    folder, made = tmp_path_factory.mktemp("tls"), []
    for name in ("one", "two"):
        pair = folder / f"{name}.pem", folder / f"{name}.key"
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
        more = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        files = ["-out", pair[0], "-keyout", pair[1]]
        subprocess.run([*command.split(), *more, *files], check=True, capture_output=True)
        made.append(pair)
    return made


@pytest.fixture
def stranger():
    """with stranger(reply) as url: a socket that answers every request with these bytes.

    None: it accepts, and never says anything. A list: the pieces, with a pause after each.
    """

    @contextlib.contextmanager
    def begin(reply):
        listener = socket.create_server(("127.0.0.1", 0))
        ended = threading.Event()

        def answer(connection):
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                for piece in (
                    [] if reply is None else [reply] if isinstance(reply, bytes) else reply
                ):
                    connection.sendall(piece)
                    if isinstance(reply, list) and ended.wait(0.1):
                        return
                if reply is None:
                    ended.wait(20)
                # What is closed with a request unread is a reset, which drops the reply.
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=listener.accept()[:1]).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    return begin


@pytest.fixture
def asked():
    """asked(text, addresses, **how): the trace, and how many seconds it took."""

    def run(text, addresses, **how):
        begun = time.monotonic()
        return asyncio.run(ask(text, addresses, **how)), time.monotonic() - begun

    return run


@pytest.fixture
def common() -> str:
    """Words that five documents share."""
    return COMMON


@pytest.fixture
def secret() -> str:
    """Words of one document, that begin with the common ones."""
    return SECRET
