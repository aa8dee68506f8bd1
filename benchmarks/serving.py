"""What a server gives of its engine's own speed, and how long its clients wait: a table.

    flexolmo demo
    python -m benchmarks.serving --model flexolmo_demo/merged --seconds 300 --out docs/results/serving.json

The server is `flexolmo serve` in a process of its own, and so are its clients, on the same machine.
64 clients stream answers, each with its own experts, one answer after the other; every answer is
compared with what the model gives without a server. Before that 8 clients, and one alone, measure
the wait for a first token.

    python -m benchmarks.serving --random 50M --seconds 60 --peer --out docs/results/serving_peer.json

makes a model of this size of `benchmarks/sizes.py` with random weights, which `transformers serve`
can serve too, and asks it for the same texts, with all experts on. Needs the extra `reference`.
"""  # noqa: E501

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import jax
import numpy as np

import flexolmo_jax as fo
from benchmarks.machine import commit, machine, versions
from benchmarks.sizes import SUITES
from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.data.tokenizer import Tokenizer

SLOTS, CLIENTS = 16, 64
PROMPTS = (
    "The theorem says",
    "def main(",
    "Once upon a time",
    "In the garden of the house",
    "1 + 1",
)


@dataclasses.dataclass
class Load:
    """What clients saw."""

    tokens: int
    seconds: float
    answers: int
    errors: int
    wrong: int
    first: list[float]  # seconds to the first token of each answer

    def row(self) -> dict[str, float]:
        p50, p95 = np.percentile(self.first, [50, 95])
        return {
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "answers": self.answers,
            "errors": self.errors,
            "wrong_answers": self.wrong,
            "first_token_p50_ms": round(1000 * p50, 1),
            "first_token_p95_ms": round(1000 * p95, 1),
        }


def tasks_of(model: fo.FlexOlmo, tokens: int) -> list[dict]:
    """Bodies of requests: every prompt with each expert off, and with all on, of many lengths."""
    choices = [[], *([name] for name in model.expert_names[1:])]
    return [
        {
            "prompt": prompt,
            "max_tokens": tokens // 4 + 7 * number * tokens // 4 % (3 * tokens // 4 + 1),
            "temperature": 0,
            "experts": {"without": off},
        }
        for number, (off, prompt) in enumerate(itertools.product(choices, PROMPTS))
    ]


def offline(model: fo.FlexOlmo, bodies: list[dict]) -> list[str]:
    """What the model gives without a server."""
    return [
        model.generate([b["prompt"]], b["max_tokens"], without=b["experts"]["without"])[0]
        for b in bodies
    ]


def engine_rate(model: fo.FlexOlmo, bodies: list[dict], seconds: float) -> float:
    """Tokens per second of the engine alone, with as many requests at a time as clients."""
    engine, done = model.engine(SLOTS, prefixes=4), 0
    running: list[fo.Request] = []
    of_bodies = itertools.cycle(bodies)

    def run_until(end: float) -> None:
        nonlocal running, done
        while time.perf_counter() < end:
            while len(running) < CLIENTS:
                body = next(of_bodies)
                without = body["experts"]["without"]
                running.append(model.request(body["prompt"], body["max_tokens"], without=without))
                engine.add(running[-1])
            engine.step()
            done += sum(len(r.generated) for r in running if r.ended)
            running = [request for request in running if not request.ended]

    run_until(time.perf_counter() + 3)
    begun, done = time.perf_counter(), -sum(len(r.generated) for r in running)
    run_until(begun + seconds)
    done += sum(len(r.generated) for r in running)
    return done / (time.perf_counter() - begun)


async def load(
    url: str,
    model: str,
    bodies: list[dict],
    expected: list[str] | None,
    clients: int,
    seconds: float,
) -> Load:
    """Streams answers to many clients for a while."""
    seen = Load(0, 0.0, 0, 0, 0, [])
    begun = time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def client(number: int) -> None:
            for at in itertools.count(number):
                if time.perf_counter() - begun > seconds:
                    return
                body = bodies[at % len(bodies)]
                options = {"stream": True, "stream_options": {"include_usage": True}}
                text = await _ask(http, {**body, **options, "model": model}, seen)
                seen.answers += 1
                if expected is not None and text != expected[at % len(bodies)]:
                    seen.wrong += 1

        await asyncio.gather(*map(client, range(clients)))
    seen.seconds = time.perf_counter() - begun
    return seen


async def _ask(http: httpx.AsyncClient, body: dict, seen: Load) -> str:
    asked, text = time.perf_counter(), []
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            seen.errors += 1
            return ""
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if not text:
                seen.first.append(time.perf_counter() - asked)
            event = json.loads(line[6:])
            if "error" in event:
                seen.errors += 1
            text += [choice["text"] for choice in event.get("choices", ())]
            seen.tokens += (event.get("usage") or {}).get("completion_tokens", 0)
    return "".join(text)


def random_model(size: str) -> str:
    """A Hugging Face directory that both servers can serve."""
    from benchmarks import pytorch

    found = SUITES["cpu"].get(size) or SUITES["smoke"][size]
    folder = tempfile.mkdtemp()
    pytorch.write_model(folder, found)
    texts = [document.text for document in read_documents("corpus:public")]
    tokenizer = Tokenizer.train(texts, found.config.vocab_size)
    (Path(folder) / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.separator_text}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(names))
    config = json.loads((Path(folder) / "config.json").read_text())
    config["eos_token_id"] = tokenizer.separator
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return folder


def peer_served(path: str) -> tuple[subprocess.Popen, str]:
    """Starts `transformers serve`, and waits until it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = Path(sys.executable).with_name("transformers")
    process = subprocess.Popen(
        [command, "serve", path, "--device", "cpu", "--port", str(port), "--continuous-batching"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    while True:
        if process.poll() is not None:
            raise SystemExit("transformers serve did not start")
        try:
            httpx.get(f"{url}/health")
            return process, url
        except httpx.HTTPError:
            time.sleep(0.2)


def served(path: str, *more: str) -> tuple[subprocess.Popen, str]:
    """Starts a server, with more options, and waits until it listens."""
    words = ("--model", path, "--port", "0", "--name", "ours", "--slots", str(SLOTS), *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "flexolmo_jax", "serve", *words],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+:\d+", line)
    if found is None:
        raise SystemExit(f"the server did not start: {line!r}")
    return process, found[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR")
    which.add_argument("--random", metavar="SIZE")
    parser.add_argument("--seconds", type=float, default=300, help="of the load; %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answer; %(default)s")
    parser.add_argument("--peer", action="store_true", help="measure `transformers serve` too")
    parser.add_argument("--out", required=True, help="JSON")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # as the server; libtpu would print warnings
    path = args.model or random_model(args.random)
    model = fo.load(path)
    bodies = tasks_of(model, args.tokens)
    expected = offline(model, bodies)
    short = max(5.0, args.seconds / 10)
    rate = engine_rate(model, bodies, short)
    rows: dict[str, dict] = {"engine alone": {"tokens_per_second": round(rate, 1)}}
    loads = ((1, short), (8, short), (CLIENTS, args.seconds))
    rows |= _measured(served(path), "ours", bodies, expected, loads)
    if args.peer:
        plain = [{k: v for k, v in body.items() if k != "experts"} for body in bodies]
        others = {
            "ours, all experts on": (lambda: served(path), "ours"),
            "ours in int8, all experts on": (lambda: served(path, "--dtype", "int8"), "ours"),
            "transformers serve": (lambda: peer_served(path), path),
        }
        for title, (start, name) in others.items():
            rows[title] = _measured(start(), name, plain, None, ((8, short),))["8 clients"]
    about = {"machine": machine(), "versions": versions("jax", "fastapi", "transformers", "torch")}
    about |= {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "model": args.random or "demo"}
    Path(args.out).write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    for name, row in rows.items():
        print(f"{name:16}", "  ".join(f"{key} {value:,}" for key, value in row.items()))


def _measured(
    started: tuple[subprocess.Popen, str], model: str, bodies: list[dict],
    expected: list[str] | None, loads: tuple[tuple[int, float], ...],
) -> dict[str, dict]:  # fmt: skip
    process, url = started
    rows = {}
    try:
        for clients, seconds in loads:
            asyncio.run(load(url, model, bodies, expected, clients, 3))  # warm
            seen = asyncio.run(load(url, model, bodies, expected, clients, seconds))
            rows[f"{clients} clients"] = seen.row()
    finally:
        process.terminate()
        process.wait()
    return rows


if __name__ == "__main__":
    main()
