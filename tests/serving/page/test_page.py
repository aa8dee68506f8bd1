"""The page of `flexolmo serve` in Chromium, over the real server and a real model."""

import json
import re
import subprocess
import sys

import pytest
from playwright.sync_api import expect

LOOKS = {"public": "look-0", "code": "look-1", "math": "look-2"}


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
    visitor = visit(site)
    page = visitor.page
    visitor.ask(temperature=0.8)
    card = visitor.answer()
    expected = visitor.said_by_api(expert_mass="token", temperature=0.8)
    assert visitor.written(card) == expected["text"]
    assert card.locator(".asked").inner_text() == visitor.prompt.input_value()
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
    visitor = visit(site)
    page = visitor.page
    visitor.ask()
    before = visitor.text()
    visitor.switch("math").click()
    expect(visitor.switch("math")).not_to_be_checked()
    with page.expect_request("**/v1/completions") as made:
        visitor.ask()
    assert made.value.post_data_json["experts"] == {"without": ["math"]}
    expect(page.get_by_role("heading", name="Without math")).to_be_visible()
    card = visitor.answer()
    assert (
        before
        != visitor.written(card)
        == visitor.said_by_api(experts={"without": ["math"]})["text"]
    )
    assert card.locator(f".word.{LOOKS['math']}").count() == 0
    expect(card.get_by_role("listitem").filter(has_text="math")).to_have_text("math off")
    visitor.switch("code").click()
    expect(visitor.switch("public")).to_be_disabled()  # somebody has to answer
    expect(page.get_by_text("one must stay on")).to_be_visible()


def test_a_profile_is_a_model_with_its_own_switches(site, visit):
    visitor = visit(site)
    page = visitor.page
    page.get_by_label("Model").select_option("ours:without-math")
    expect(visitor.switch("math")).to_have_count(0)
    visitor.ask()
    assert visitor.text() == visitor.said_by_api(model="ours:without-math")["text"]
    expect(page.get_by_role("heading", name="ours:without-math")).to_be_visible()
    page.get_by_label("Model").select_option("ours")
    expect(visitor.switch("math")).to_be_checked()


def test_side_by_side(site, visit):
    visitor = visit(site)
    page = visitor.page
    page.get_by_label("Side by side").select_option(label="with and without math")
    visitor.ask()
    own = [visitor.text(i) for i in range(2)]
    without = {"without": ["math"]}
    assert own[0] != own[1]
    assert own == [visitor.said_by_api()["text"], visitor.said_by_api(experts=without)["text"]]
    assert page.get_by_role("heading", level=3).all_inner_texts() == ["All sources", "Without math"]
    left, right = (page.get_by_role("article").nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    expect(page.locator("#difference")).to_contain_text("The two answers")


def test_errors_are_shown_where_they_can_be_mended(site, visit):
    visitor = visit(site)
    page = visitor.page
    visitor.ask(tokens=64)  # with the prompt, more than the model's 64
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("new ones are possible")
    expect(page.get_by_text("ended by an error")).to_be_visible()
    page.locator("summary").first.click()
    visitor.ask(temperature=3)
    expect(alert).to_contain_text("Temperature: ")
    expect(page.get_by_label("Temperature")).to_be_focused()
    visitor.ask()
    expect(alert).to_be_hidden()
    assert visitor.text() == visitor.said_by_api()["text"]


# The lengths that an answer had, one after another.
WATCH = """() => {
  const answers = document.getElementById("answers");
  window.lengths = [];
  const note = () => window.lengths.push(answers.querySelector(".words")?.textContent.length);
  new MutationObserver(note).observe(answers, { childList: true, subtree: true });
}"""


def test_words_arrive_one_by_one_through_a_proxy_that_cuts_and_delays(site, visit, proxy):
    with proxy(site, size=61, delay=0.0005) as url:
        visitor = visit(url)
        visitor.page.evaluate(WATCH)
        visitor.ask()
        assert visitor.text() == visitor.said_by_api()["text"]
        assert len(set(visitor.page.evaluate("window.lengths"))) > 3


def test_stop_ends_the_request(site, visit, proxy):
    visitor = visit(site)
    page = visitor.page
    with proxy(site, size=16, delay=0.01) as url:
        visitor.complete_through(url)
        visitor.ask(tokens=36)
        expect(page.locator(".word:not([hidden])").first).to_be_visible()
        stop = page.get_by_role("button", name="Stop")
        expect(stop).to_be_focused()
        stop.click()
        card = visitor.answer()
        expect(card).to_contain_text("stopped by you")
        expect(page.get_by_role("button", name="Generate")).to_be_focused()
        assert visitor.said_by_api(max_tokens=36)["text"].startswith(visitor.written(card))
        expect(page.get_by_role("alert")).to_be_hidden()


def test_a_connection_that_breaks_is_an_error(site, visit, proxy):
    visitor = visit(site)
    page = visitor.page
    expect(visitor.switch("math")).to_be_visible()
    with proxy(site, size=500, delay=0, most=2500) as url:
        visitor.complete_through(url)
        visitor.ask()
        expect(page.get_by_role("alert")).to_have_text(
            re.compile("The connection ended before the answer did|network")
        )
        expect(visitor.answer()).to_contain_text("ended by an error")


@pytest.mark.parametrize(
    "last, shown_text",
    [
        (
            {"choices": [{"text": "", "finish_reason": "expert_withdrawn"}]},
            "a source was withdrawn",
        ),
        ({"error": {"message": "the engine failed", "code": "engine_error"}}, "the engine failed"),
        ("not JSON", "an event that is not JSON: not JSON"),
    ],
)
def test_the_end_of_a_stream_is_explained(site, visit, last, shown_text):
    visitor = visit(site)
    first = {"choices": [{"text": "A <b>", "token_mass": [{"text": "A <b>", "mass": {"code": 1}}]}]}
    events = [json.dumps(x) if isinstance(x, dict) else x for x in (first, last)]
    body = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
    visitor.page.route(
        "**/v1/completions", lambda r: r.fulfill(content_type="text/event-stream", body=body)
    )
    visitor.ask()
    assert visitor.text() == "A <b>"
    expect(visitor.page.get_by_text(shown_text)).to_be_visible()


def test_a_key_sees_what_its_policy_permits(guarded, visit):
    url, keys = guarded
    visitor = visit(url)
    page = visitor.page
    field = page.get_by_label("API key")
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Bearer")
    field.fill(keys["no_math"])
    page.keyboard.press("Enter")
    expect(visitor.switch("public")).to_be_disabled()
    expect(page.get_by_text("always on")).to_be_visible()
    visitor.switch("public").click(force=True)
    expect(visitor.switch("public")).to_be_checked()
    expect(page.get_by_role("alert")).to_be_hidden()
    visitor.open_all()
    visitor.ask("A set")
    expected = visitor.said_by_api(keys["no_math"], prompt="A set")["text"]
    assert visitor.text() == expected
    assert "math" not in page.content().replace(expected, "")
    assert keys["no_math"] not in page.content()
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [
        0,
        "",
        1,
    ]
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("switch")).to_have_count(0)
    expect(page.get_by_role("article")).to_have_count(0)
    assert (
        page.evaluate("sessionStorage.length") == 0
        and "code" not in page.locator("main").inner_text()
    )


@pytest.mark.parametrize("owner, has_shares", [("shares", True), ("blind", False)])
def test_a_policy_may_hide_the_weights(guarded, visit, owner, has_shares):
    url, keys = guarded
    visitor = visit(url)
    page = visitor.page
    page.get_by_label("API key").fill(keys[owner])
    page.keyboard.press("Enter")
    visitor.ask()
    card = visitor.answer()
    assert visitor.written(card) == visitor.said_by_api(keys[owner])["text"]
    assert card.locator(".word").count() == 0
    expect(card.get_by_text("does not allow weights for single words")).to_be_visible()
    expect(card.get_by_role("list")).to_be_visible(visible=has_shares)


def test_the_request_can_be_made_by_others(site, visit):
    visitor = visit(site)
    page = visitor.page
    visitor.open_all()
    visitor.switch("code").click()
    visitor.ask('It\'s "a\\nb":\n$HOME `x` ß 😀')
    expected = visitor.text()
    request = page.get_by_role("region", name="Request")

    def run(*command):
        text = request.evaluate("element => element.textContent")
        ran = subprocess.run([*command, text], capture_output=True, timeout=120, check=True)
        return ran.stdout.decode()

    events = [line.removeprefix("data: ") for line in run("bash", "-c").splitlines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(c["text"] for e in events for c in json.loads(e)["choices"]) == expected
    page.get_by_label("Python").check()
    assert run(sys.executable, "-Xutf8", "-c") == f"{expected}\n"
