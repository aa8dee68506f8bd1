"""The page of a trace, in Chromium: spans, documents, keyboard, contrast, width, and no network."""

import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from flexolmo_jax.tracing.page import rarity_levels, trace_page
from flexolmo_jax.tracing.results import Passage, Span, Trace

TEXT = (
    "😀 He said that the old mill by the river burned down in a night, </script><b>alas</b>."
    " Yes, in a night"
)
EVIL = (
    "</script><script>document.title = 'run'</script><img src=http://x.example/a onerror=alert(1)>"
)


def span(words, log_probability, counts, *passages):
    start = TEXT.index(words)
    return Span(start, start + len(words), 5, log_probability, counts, passages)


def passage(owner, document, match, score, source="", before="so it was: ", after=" and so on"):
    return Passage(owner, document, source, "CC0-1.0", "", before, match, after, score)


MILL = passage("news", "a:1", "the old mill by the river", 3.0, "https://news.example/mill")
NIGHT = passage("news", "a:1", "burned down in a night", 2.0, "https://news.example/mill")
TRACE = Trace(
    TEXT,
    (
        span("the old mill by the river", -40, {"news": 2, "books": 1}, MILL,
             passage("books", "b:7", "the old mill by the river", 1.0,
                     "javascript:alert(1)", EVIL * 5)),
        span("the river burned down", -60, {"books": 1},
             passage("books", "b:9", "the river burned down", 0.5)),
        span("in a night", -20, {"news": 4}, NIGHT._replace(match="in a night")),
        span("</script><b>alas</b>", -30, {"closed": 1}, Passage("closed", "")),
        Span(len(TEXT) - 10, len(TEXT), 5, -20, {"news": 4}, (NIGHT._replace(match="in a night"),)),
    ),
    similar=(passage("books", "c:3", "a mill on fire", 0.1),),
    asked=("news", "books", "closed"),
    missing={"poems": "no answer within 2 s"},
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian and Ubuntu: apt install chromium)")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = playwright.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, tmp_path):
    """visit(**how): the page of TRACE, which loads nothing and whose console is empty."""
    file = tmp_path / "page.html"
    file.write_text(trace_page(TRACE, "What happened?"), encoding="utf-8")
    contexts, others, said = [], [], []

    def open_page(**how):
        contexts.append(browser.new_context(**how))
        page = contexts[-1].new_page()
        page.on("request", lambda r: r.url == file.as_uri() or others.append(r.url))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not others and not said


def documents(page):
    return page.locator("#documents h3").all_inner_texts()


def test_a_span_shows_its_documents_and_a_document_its_spans(visit):
    page = visit()
    assert page.locator("#text").evaluate("element => element.textContent") == TEXT
    assert page.title() == "Where these words stand" and page.locator("img").count() == 0
    assert documents(page) == ["a:1", "b:7", "b:9", "A document that its owner does not name"]
    expect(page.get_by_text("Its owner shows no text.")).to_be_visible()
    expect(page.get_by_text("No answer from poems (no answer within 2 s).")).to_be_visible()
    expect(page.locator("#similar")).to_contain_text("a mill on fire")
    spans = page.locator("#text").get_by_role("button")
    assert spans.all_inner_texts()[0] == "the old mill by the river burned down"  # two that overlap
    assert page.locator("#spans li").count() == 4  # the text repeats one
    spans.nth(0).click()
    assert documents(page) == ["a:1", "b:7", "b:9"]
    expect(page.get_by_role("status")).to_contain_text("3 times (news 2, books 1)")
    page.locator("#spans").get_by_role("button", name="the river burned").click()
    assert documents(page) == ["b:9"]
    page.get_by_role("button", name="Show all").click()
    page.get_by_role("article", name="a:1").get_by_role("button", name="Show its 2 spans").click()
    assert [c.split()[-1] for c in spans.evaluate_all("all => all.map(e => e.className)")] == [
        "rare-3", "rare-1", "off", "rare-1",
    ]  # fmt: skip
    page.keyboard.press("Escape")
    assert len(documents(page)) == 4


def test_links_lead_to_web_pages_only_and_context_unfolds(visit):
    page = visit()
    links = page.locator("a").evaluate_all("all => all.map(a => a.href)")
    assert links == ["https://news.example/mill"]
    card = page.get_by_role("article", name="b:7")
    before = len(card.inner_text())
    card.get_by_role("button", name="More context").click()
    assert len(card.inner_text()) > before + 100
    expect(card.get_by_role("button", name="Less context")).to_be_focused()


def test_keyboard_and_names(visit):
    page = visit()
    for _ in range(3):
        page.keyboard.press("Tab")
    mark = page.locator("#text").get_by_role("button").nth(2)
    expect(mark).to_be_focused()
    expect(mark).to_have_accessible_name(
        "</script><b>alas</b> - 3 of 4, rarer words, occurs 1 time: closed 1"
    )
    page.keyboard.press("Enter")
    expect(mark).to_have_attribute("aria-pressed", "true")
    assert len(documents(page)) == 1
    page.keyboard.press("Space")
    expect(mark).to_have_attribute("aria-pressed", "false")
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    expect(page.get_by_role("region", name="Text")).to_be_visible()


CONTRASTS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (...colours) => {
    for (const colour of colours) [context.fillStyle = colour, context.fillRect(0, 0, 1, 1)];
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
      .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  };
  const owns = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const all = [...document.querySelectorAll("body *")];
  return all.filter((e) => e.checkVisibility() && owns(e)).map((element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.unshift(getComputedStyle(e).backgroundColor);
    }
    const [a, b] = [paint(...layers), paint(getComputedStyle(element).color)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_phone_width(visit, scheme):
    page = visit(
        color_scheme=scheme, reduced_motion="reduce", viewport={"width": 360, "height": 740}
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 40 and min(contrasts) >= 4.5
    small = page.locator("button:visible").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().height).filter(height => height < 24)"
    )
    assert not small  # WCAG 2.5.8


def test_the_rarest_third_is_the_darkest():
    made = [Span(0, 1, 1, -float(rank), {}) for rank in range(6)]
    assert rarity_levels(tuple(made)) == [1, 1, 2, 2, 3, 3]
    assert rarity_levels(tuple(made[:1])) == [3] and rarity_levels(()) == []
