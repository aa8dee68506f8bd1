"""The page of `flexolmo serve` in Chromium, over the real server and a real model."""

import ast
import asyncio
import contextlib
import json
import queue
import re
import shutil
import subprocess
import threading
import time

import httpx
import jax
import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from flexolmo_jax.federation.anchor import read_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merge import merge
from flexolmo_jax.model import load
from flexolmo_jax.serving.app import make_app
from flexolmo_jax.serving.keys import Policy, add_key
from flexolmo_jax.serving.service import Settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    " --disable-sync --no-first-run"
)
PROMPT = "The theorem's \"proof\" of 'naïve' sets"
LOOKS = {"public": "look-0", "code": "look-1", "math": "look-2"}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian and Ubuntu: apt install chromium)"
)


# The server, the browser, and a network between them that cuts and delays.


@contextlib.contextmanager
def serving(settings, model):
    """The address of a server, which runs in a thread of this process."""
    config = uvicorn.Config(make_app(settings, model), port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


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
def served(merged):
    return load(merged)


@pytest.fixture(scope="module")
def site(merged, served):
    """A server without keys."""
    with serving(Settings(merged, "ours"), served) as url:
        yield url


@pytest.fixture(scope="module")
def guarded(merged, served, tmp_path_factory):
    """A server with keys: its address, and the keys by the names of their owners."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    policies = (
        Policy("no_math", experts=("public", "code"), always_on=("public",)),
        Policy("shares", expert_mass="request"),
        Policy("blind", expert_mass="none"),
    )
    keys = {policy.name: add_key(file, policy) for policy in policies}
    with serving(Settings(merged, "ours", keys=file), served) as url:
        yield url, keys


@contextlib.contextmanager
def proxy(url, *, size, delay, most=None):
    """A TCP proxy that passes on `size` bytes at a time; with `most`, it hangs up after so many."""
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
        with contextlib.suppress(ConnectionError):
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


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(url, **how): a page, which may ask nobody but its server, and say nothing on the console."""
    contexts, strangers, said = [], [], []

    def open_page(url, **how) -> Page:
        contexts.append(chromium.new_context(**how))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda r: r.url.startswith(url) or strangers.append(r.url))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda m: "Failed to load resource" in m.text or said.append(m.text))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not strangers and not said


# What a visitor does.


def prompt(page):
    return page.get_by_role("textbox", name="Prompt")


def switch(page, name):
    return page.get_by_role("switch", name=name)


def ask(page, text=PROMPT, tokens=24):
    expect(page.get_by_role("switch").first).to_be_visible()
    page.locator("#max-tokens").evaluate("(field, value) => (field.value = value)", tokens)
    prompt(page).fill(text)
    page.get_by_role("button", name="Generate").click()


def complete_through(page, url):
    """Only the page's completions pass through a proxy; its files come from the server."""
    page.route("**/v1/completions", lambda route: route.continue_(url=f"{url}/v1/completions"))


def answer(page, number=0):
    """The locator of an answer, once it is complete."""
    card = page.get_by_role("article").nth(number)
    expect(card).to_have_attribute("aria-busy", "false", timeout=60_000)
    return card


def written(card):
    return card.locator(".words").evaluate("box => box.textContent")


def said_by_server(url, key=None, **body):
    """The whole answer of the API to the request that the page makes."""
    body = {"model": "ours", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 1, **body}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
    return response.json()["choices"][0]


def words_of(tokens):
    """Words and their weights, obvious and slow: character by character."""
    characters, waiting = [], []
    for token in tokens:
        seen = sum(not c.isspace() for c in token["text"])
        for c in token["text"]:
            parts = [] if c.isspace() else [(token["mass"], 1 / seen), *waiting]
            waiting = waiting if c.isspace() else []
            characters.append((c, parts))
        if not token["text"]:
            waiting.append((token["mass"], 1))
    words = []
    for i, (c, parts) in enumerate(characters):
        if c.isspace():
            continue
        if not i or characters[i - 1][0].isspace():
            words.append(["", {}, 0.0])
        words[-1][0] += c
        for mass, share in parts:
            words[-1][2] += share
            for name, weight in mass.items():
                words[-1][1][name] = words[-1][1].get(name, 0) + share * weight
    return [(text, {n: x / total for n, x in sums.items()}) for text, sums, total in words]


def test_words_carry_the_mark_of_their_strongest_source(site, visit):
    page = visit(site)
    ask(page)
    card = answer(page)
    expected = said_by_server(site, expert_mass="token")
    assert written(card) == expected["text"]
    assert card.locator(".asked").inner_text() == PROMPT
    words = words_of(expected["token_mass"])
    spans = card.locator(".word:not([hidden])")
    assert spans.all_inner_texts() == [text for text, _ in words]
    for i, (_, mass) in enumerate(words):
        first, second, *_ = sorted([*mass.values(), 0.0, 0.0], reverse=True)
        if first - second > 1e-3:  # the server rounds
            assert LOOKS[max(mass, key=mass.get)] in spans.nth(i).get_attribute("class").split()
    for name, share in expected["expert_mass"].items():
        row = card.get_by_role("listitem").filter(has_text=name)
        assert abs(shown(row.inner_text()) - share) < 1e-3

    spans.nth(1).hover()
    expect(page.locator("#tip strong")).to_have_text(words[1][0])
    shares = {text.split()[0]: shown(text) for text in page.locator("#tip li").all_inner_texts()}
    assert shares == pytest.approx({**dict.fromkeys(LOOKS, 0), **words[1][1]}, abs=1e-3)
    page.mouse.move(0, 0)
    expect(page.locator("#tip")).to_be_hidden()


def shown(text):
    return float(re.search(r"([\d.]+)%", text)[1]) / 100


def test_a_switch_changes_the_request_and_the_answer(site, visit):
    page = visit(site)
    ask(page)
    before = written(answer(page))
    switch(page, "math").click()
    expect(switch(page, "math")).not_to_be_checked()
    with page.expect_request("**/v1/completions") as made:
        ask(page)
    assert made.value.post_data_json["experts"] == {"without": ["math"]}
    expect(page.get_by_role("heading", name="Without math")).to_be_visible()
    card = answer(page)
    assert before != written(card) == said_by_server(site, experts={"without": ["math"]})["text"]
    assert card.locator(f".word.{LOOKS['math']}").count() == 0
    expect(card.get_by_role("listitem").filter(has_text="math")).to_have_text("math off")
    switch(page, "code").click()
    expect(switch(page, "public")).to_be_disabled()  # somebody has to answer
    expect(page.get_by_text("one must stay on")).to_be_visible()


def test_a_profile_is_a_model_with_its_own_switches(site, visit):
    page = visit(site)
    page.get_by_label("Model").select_option("ours:without-math")
    expect(switch(page, "math")).to_have_count(0)
    ask(page)
    assert written(answer(page)) == said_by_server(site, model="ours:without-math")["text"]
    page.get_by_label("Model").select_option("ours")
    expect(switch(page, "math")).to_be_checked()


def test_side_by_side(site, visit):
    page = visit(site)
    page.get_by_label("Side by side").select_option(label="with and without math")
    ask(page)
    own = [written(answer(page, i)) for i in range(2)]
    without = {"without": ["math"]}
    assert own == [said_by_server(site)["text"], said_by_server(site, experts=without)["text"]]
    assert page.get_by_role("heading", level=3).all_inner_texts() == ["All sources", "Without math"]
    left, right = (page.get_by_role("article").nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    expect(page.locator("#difference")).to_contain_text("The two answers")


def test_keyboard_only(site, visit):
    page = visit(site)
    expect(switch(page, "math")).to_be_visible()

    def tab_to(locator):
        for _ in range(30):
            if locator.evaluate("element => element === document.activeElement"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {locator}")

    tab_to(switch(page, "math"))
    page.keyboard.press("Space")
    expect(switch(page, "math")).not_to_be_checked()
    tab_to(page.locator("#prompt"))
    page.keyboard.type("A set")
    page.keyboard.press("Control+Enter")
    words = answer(page).locator(".word:not([hidden])")
    tab_to(words.first)
    page.keyboard.press("ArrowRight")
    expect(words.nth(1)).to_be_focused()
    expect(page.locator("#tip")).to_be_visible()
    expect(page.locator("#weights")).to_have_text(re.compile(r"\w+ [<>]?[\d.]+%, \w+ [<>]?[\d.]+%"))
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    page.keyboard.press("End")
    expect(words.last).to_be_focused()
    page.keyboard.press("Tab")  # one stop for all words
    expect(page.get_by_role("button", name="Copy text")).to_be_focused()


def test_phone_width_has_no_horizontal_scrolling(site, visit):
    page = visit(site, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.get_by_label("Side by side").select_option(label="with and without math")
    for summary in page.locator("summary").all():
        summary.click()
    ask(page, "antidisestablishmentarianism" * 3)
    answer(page), answer(page, 1)
    page.locator(".word:not([hidden])").last.tap()
    expect(page.locator("#tip")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    small = page.locator("button:visible, select, .source").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().height).filter(height => height < 24)"
    )
    assert not small  # WCAG 2.5.8


# Each text with what is painted behind it, as the browser would paint it.
CONTRASTS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (...colours) => {
    for (const colour of colours) [context.fillStyle = colour, context.fillRect(0, 0, 1, 1)];
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => rgb.map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const owns = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!(owns || element.matches("textarea, select, [type=number]")) || !element.checkVisibility()) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(getComputedStyle(e).backgroundColor);
    const [a, b] = [paint(...layers), paint(getComputedStyle(element).color)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, element.tagName, element.className]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme, is_dark", [("light", False), ("dark", True)])
def test_texts_have_contrast_in_light_and_in_dark(site, visit, scheme, is_dark):
    page = visit(site, color_scheme=scheme, reduced_motion="reduce")
    switch(page, "code").click()
    for summary in page.locator("summary").all():
        summary.click()
    ask(page)
    answer(page).locator(".word:not([hidden])").first.hover()
    prompt(page).fill("")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text("Write a prompt first.")
    paper = page.locator("html").evaluate(
        r"e => getComputedStyle(e).backgroundColor.match(/\d+/g).map(Number)"
    )
    assert (max(paper) < 64) == is_dark
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 40
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    assert page.locator(".word").first.evaluate("e => getComputedStyle(e).animationName") == "none"


def test_a_screen_reader_finds_names_and_roles(site, visit):
    page = visit(site)
    ask(page, "A set")
    answer(page)
    expect(page.locator("main")).to_match_aria_snapshot("""
      - main:
        - region "Sources":
          - heading "Sources" [level=2]
          - list "Sources":
            - listitem:
              - switch "public" [checked]
            - listitem:
              - switch "code" [checked]
            - listitem:
              - switch "math" [checked]
        - heading "Prompt" [level=2]
        - textbox "Prompt": A set
        - combobox "Side by side"
        - button "Generate"
        - region "Answer":
          - article:
            - heading "All sources" [level=3]
            - list "Shares of the answer":
              - listitem: /public .*%/
              - listitem: /code .*%/
              - listitem: /math .*%/
            - 'group "All sources: prompt and answer"': /A set.+/
            - button "Copy text"
    """)
    log = page.get_by_role("log")
    expect(log).to_contain_text("Answer complete. Mostly")
    assert written(answer(page)).strip()[:8] in log.evaluate("e => e.textContent")
    assert log.locator("p").count() <= 3  # not token by token
    for summary in page.locator("summary").all():
        summary.click()
    for role, name in (
        ("spinbutton", "Temperature"), ("spinbutton", "Max tokens"), ("spinbutton", "Seed"),
        ("radio", "curl"), ("radio", "Python"), ("button", "Copy"), ("region", "Request"),
    ):  # fmt: skip
        expect(page.get_by_role(role, name=name, exact=True)).to_be_visible()


def test_errors_are_shown_where_they_can_be_mended(site, visit):
    page = visit(site)
    ask(page, tokens=64)  # with the prompt, more than the model's 64
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("new ones are possible")
    expect(page.get_by_text("ended by an error")).to_be_visible()
    page.locator("summary").first.click()
    page.get_by_label("Temperature").fill("3")
    ask(page)
    expect(alert).to_contain_text("Temperature: ")
    expect(page.get_by_label("Temperature")).to_be_focused()
    page.get_by_label("Temperature").fill("0")
    ask(page)
    expect(alert).to_be_hidden()
    assert written(answer(page)) == said_by_server(site, temperature=0)["text"]


def test_words_arrive_one_by_one_through_a_proxy_that_cuts_and_delays(site, visit):
    with proxy(site, size=29, delay=0.0005) as url:
        page = visit(url)
        ask(page)
        counts = set()
        card = page.get_by_role("article")
        while card.get_attribute("aria-busy") == "true":
            counts.add(len(written(card)))
        assert written(card) == said_by_server(site)["text"]
        assert len(counts) > 5


def test_stop_ends_the_request(site, visit):
    page = visit(site)
    with proxy(site, size=16, delay=0.01) as url:
        complete_through(page, url)
        ask(page, tokens=36)
        expect(page.locator(".word:not([hidden])").first).to_be_visible()
        stop = page.get_by_role("button", name="Stop")
        expect(stop).to_be_focused()
        stop.click()
        card = answer(page)
        expect(card).to_contain_text("stopped by you")
        expect(page.get_by_role("button", name="Generate")).to_be_focused()
        assert said_by_server(site, max_tokens=36)["text"].startswith(written(card))
        expect(page.get_by_role("alert")).to_be_hidden()


def test_a_connection_that_breaks_is_an_error(site, visit):
    page = visit(site)
    expect(switch(page, "math")).to_be_visible()
    with proxy(site, size=500, delay=0, most=2500) as url:
        complete_through(page, url)
        ask(page)
        expect(page.get_by_role("alert")).to_have_text(
            re.compile("The connection ended before the answer did|network")
        )
        expect(answer(page)).to_contain_text("ended by an error")


def test_a_key_sees_what_its_policy_permits(guarded, visit):
    url, keys = guarded
    page = visit(url)
    field = page.get_by_label("API key")
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Bearer")
    field.fill(keys["no_math"])
    page.keyboard.press("Enter")
    expect(switch(page, "public")).to_be_disabled()
    expect(page.get_by_text("always on")).to_be_visible()
    switch(page, "public").click(force=True)
    expect(switch(page, "public")).to_be_checked()
    expect(page.get_by_role("alert")).to_be_hidden()
    for summary in page.locator("summary").all():
        summary.click()
    ask(page, "A set")
    expected = said_by_server(url, keys["no_math"], prompt="A set")["text"]
    assert written(answer(page)) == expected
    assert "math" not in page.content().replace(expected, "")
    assert keys["no_math"] not in page.content()
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("switch")).to_have_count(0)
    expect(page.get_by_role("article")).to_have_count(0)
    assert page.evaluate("sessionStorage.length") == 0 and "code" not in page.locator("main").inner_text()


@pytest.mark.parametrize("owner, has_shares", [("shares", True), ("blind", False)])
def test_a_policy_may_hide_the_weights(guarded, visit, owner, has_shares):
    url, keys = guarded
    page = visit(url)
    page.get_by_label("API key").fill(keys[owner])
    page.keyboard.press("Enter")
    ask(page)
    card = answer(page)
    assert written(card) == said_by_server(url, keys[owner])["text"]
    assert card.locator(".word").count() == 0
    expect(card.get_by_text("does not allow weights for single words")).to_be_visible()
    expect(card.get_by_role("list")).to_be_visible(visible=has_shares)


def test_the_request_can_be_made_by_others(site, visit):
    page = visit(site)
    page.locator("summary").last.click()
    switch(page, "code").click()
    ask(page, 'It\'s "a\\nb":\n$HOME `x` ß 😀')
    expected = written(answer(page))
    shown_request = page.get_by_role("region", name="Request")
    ran = subprocess.run(
        ["bash", "-c", shown_request.evaluate("e => e.textContent")], capture_output=True, text=True
    )
    events = [line.removeprefix("data: ") for line in ran.stdout.splitlines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(c["text"] for e in events for c in json.loads(e)["choices"]) == expected

    page.get_by_label("Python").check()
    code = ast.parse(shown_request.evaluate("e => e.textContent"))
    (call,) = (
        node for node in ast.walk(code)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "client.completions.create"
    )  # fmt: skip
    given = {k.arg: k.value for k in call.keywords}
    assert ast.literal_eval(given["prompt"]) == prompt(page).input_value()
    (extras,) = (ast.literal_eval(n.iter) for n in ast.walk(code) if isinstance(n, ast.For) and isinstance(n.iter, ast.List))
    assert extras == [{"experts": {"without": ["code"]}, "expert_mass": "token"}]


EVENTS = """async ([path, bytes, cuts]) => {
  const { readEvents } = await import(path);
  const edges = [0, ...cuts, bytes.length];
  const body = new ReadableStream({
    start(controller) {
      edges.slice(1).forEach((end, i) => controller.enqueue(new Uint8Array(bytes.slice(edges[i], end))));
      controller.close();
    },
  });
  const found = [];
  for await (const data of readEvents(body)) found.push(data);
  return found;
}"""


def test_events_are_the_same_however_the_bytes_are_cut(site, visit):
    page = visit(site)
    text = ": hello\ndata: eins ü😀\n\ndata:zwei\r\nid: 1\r\ndata: drei\r\n\r\nretry: 5\rdata: vier\r\rdata: [DONE]"
    expected = ["eins ü😀", "zwei\ndrei", "vier", "[DONE]"]
    data = list(text.encode())
    cuts = [[i] for i in range(1, len(data))] + [list(range(1, len(data)))]
    for cut in cuts:
        assert page.evaluate(EVENTS, [f"{site}/static/sse.js", data, cut]) == expected, cut


WORDS = """async ([path, tokens]) => {
  const { Words } = await import(path);
  const words = new Words();
  for (const [text, mass] of tokens) words.add(text, mass);
  return words.list.filter((w) => w.text).map((w) => [w.text, w.mass.share("a")]);
}"""


def test_words_of_tokens(site, visit):
    page = visit(site)

    def words(*tokens):
        tokens = [(text, {"a": a, "b": 1 - a}) for text, a in tokens]
        return page.evaluate(WORDS, [f"{site}/static/words.js", tokens])

    assert words((" the", 1), ("or", 0), ("em", 0.5), (" ", 0), ("x", 1)) == [["theorem", 0.5], ["x", 1]]
    # A token counts for each of its words by its share of the characters.
    assert words(("ab", 1), ("c d", 0)) == [["abc", pytest.approx(2 / 3)], ["d", 0]]
    assert words(("", 1), ("é", 0), ("\n\n", 1), ("z", 0.25)) == [["é", 0.5], ["z", 0.25]]
    assert words(("ok 数学", 1), ("家", 0)) == [["ok", 1], ["数", 1], ["学", 1], ["家", 0]]
