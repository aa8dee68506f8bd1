"""Chromium, and a network between it and the server that cuts and delays."""

import asyncio
import contextlib
import queue
import shutil
import threading

import httpx
import jax
import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.serving.keys import KEYS, Policy

FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    " --disable-sync --no-first-run"
)
PROMPT = "The theorem's \"proof\" of 'naïve' sets"


@pytest.fixture(scope="module")
def merged(world, tmp_path_factory):
    """A model with an expert, math, that says something else than the others."""
    folder, anchor = tmp_path_factory.mktemp("page"), read_anchor(world.anchor)
    random = np.random.default_rng(0)
    expert = jax.tree.map(
        lambda x: x + random.standard_normal(x.shape, np.float32), anchor.weights.public
    )
    about = {"licence": "CC0-1.0", "contact": "a@b.example"}
    write_expert(folder / "math", expert, "math", anchor, about)
    merge(world.anchor, [world.experts["code"], folder / "math"], folder / "merged")
    return folder / "merged"


@pytest.fixture(scope="module")
def site(serving, merged):
    """The address of a server without keys."""
    with serving(merged) as server:
        yield server.url


@pytest.fixture(scope="module")
def guarded(serving, merged, tmp_path_factory):
    """A server with keys: its address, and the keys by the names of their owners."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    policies = (
        Policy("no_math", experts=("public", "code"), always_on=("public",)),
        Policy("shares", expert_mass="request"),
        Policy("blind", expert_mass="none"),
    )
    keys = {policy.name: KEYS.add(file, policy) for policy in policies}
    with serving(merged, keys=file) as server:
        yield server.url, keys


@contextlib.contextmanager
def _proxy(url, *, size, delay, most=None):
    """A TCP proxy that passes on `size` bytes at a time; with `most`, it then hangs up."""
    host, addresses, end = url.removeprefix("http://").split(":"), queue.Queue(), asyncio.Event()

    async def back(server, client):
        count = 0
        while data := await server.read(size):
            client.write(data)
            await client.drain()
            count += len(data)
            if most is not None and count >= most:
                break
            await asyncio.sleep(delay)
        client.close()

    async def forth(client, server):
        while data := await client.read(65536):
            server.write(data)
        server.close()

    async def connected(reader, writer):
        other_reader, other_writer = await asyncio.open_connection(*host)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):  # at the end
            await asyncio.gather(forth(reader, other_writer), back(other_reader, writer))

    async def listen():
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        addresses.put((f"http://127.0.0.1:{port}", asyncio.get_running_loop()))
        await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(listen(),))
    thread.start()
    address, loop = addresses.get(timeout=10)
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()


@pytest.fixture
def proxy():
    """with proxy(url, size=..., delay=...) as url: the address of a proxy."""
    return _proxy


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian and Ubuntu: apt install chromium)")
    expect.set_options(timeout=30_000)  # other tests may run beside these
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS.split())
        yield browser
        browser.close()


class Visitor:
    """Somebody who uses the page."""

    def __init__(self, page: Page, url: str):
        self.page, self.url = page, url

    @property
    def prompt(self) -> Locator:
        return self.page.get_by_role("textbox", name="Prompt")

    def switch(self, name: str) -> Locator:
        return self.page.get_by_role("switch", name=name)

    def open_all(self) -> None:
        """Unfolds the sampling and the request."""
        for summary in self.page.locator("summary").all():
            summary.click()

    def ask(self, text=PROMPT, tokens=24, temperature=0) -> None:
        expect(self.page.get_by_role("switch").first).to_be_visible()
        for field, value in (("#max-tokens", tokens), ("#temperature", temperature)):
            self.page.locator(field).evaluate("(field, value) => (field.value = value)", value)
        self.prompt.fill(text)
        self.page.get_by_role("button", name="Generate").click()

    def answer(self, number=0) -> Locator:
        """An answer, once it is complete."""
        card = self.page.get_by_role("article").nth(number)
        expect(card).to_have_attribute("aria-busy", "false", timeout=60_000)
        return card

    def text(self, number=0) -> str:
        return self.written(self.answer(number))

    def complete_through(self, url: str) -> None:
        """Only completions pass through a proxy; the page's files come from the server."""
        there = f"{url}/v1/completions"
        self.page.route("**/v1/completions", lambda route: route.continue_(url=there))

    def said_by_api(self, key=None, **body) -> dict:
        """The whole answer of the API to what `ask` asks."""
        body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "seed": 1, **body}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        path = f"{self.url}/v1/completions"
        said = httpx.post(path, json={"model": "ours", **body}, headers=headers, timeout=60)
        return said.json()["choices"][0]

    @staticmethod
    def written(card: Locator) -> str:
        """What an answer says up to now."""
        return card.locator(".words").evaluate("box => box.textContent")


@pytest.fixture
def visit(chromium):
    """visit(url, **how): a visitor, whose page asks only its server, and whose console is empty."""
    contexts, strangers, said = [], [], []

    def open_page(url, **how) -> Visitor:
        contexts.append(chromium.new_context(**how))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda r: r.url.startswith(url) or strangers.append(r.url))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda m: "Failed to load resource" in m.text or said.append(m.text))
        page.goto(url)
        return Visitor(page, url)

    yield open_page
    for context in contexts:
        context.close()
    assert not strangers and not said
