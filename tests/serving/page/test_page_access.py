"""The page without a mouse, without eyes, on a phone: keyboard, names, contrast, width."""

import re

import pytest
from playwright.sync_api import expect


def test_keyboard_only(site, visit):
    visitor = visit(site)
    page = visitor.page
    expect(visitor.switch("math")).to_be_visible()

    def tab_to(locator):
        for _ in range(30):
            if locator.evaluate("element => element === document.activeElement"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {locator}")

    tab_to(visitor.switch("math"))
    page.keyboard.press("Space")
    expect(visitor.switch("math")).not_to_be_checked()
    tab_to(page.locator("#prompt"))
    page.keyboard.type("A set")
    page.keyboard.press("Control+Enter")
    words = visitor.answer().locator(".word:not([hidden])")
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
    visitor = visit(site, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = visitor.page
    page.get_by_label("Side by side").select_option(label="with and without math")
    visitor.open_all()
    visitor.ask("antidisestablishmentarianism" * 3)
    visitor.answer(), visitor.answer(1)
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
    const owns = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
      || element.matches("textarea, select, [type=number]");
    if (!owns || !element.checkVisibility()) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.unshift(getComputedStyle(e).backgroundColor);
    }
    const [a, b] = [paint(...layers), paint(getComputedStyle(element).color)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, element.tagName, element.className]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme, is_dark", [("light", False), ("dark", True)])
def test_texts_have_contrast_in_light_and_in_dark(site, visit, scheme, is_dark):
    visitor = visit(site, color_scheme=scheme, reduced_motion="reduce")
    page = visitor.page
    visitor.switch("code").click()
    visitor.open_all()
    visitor.ask()
    visitor.answer().locator(".word:not([hidden])").first.hover()
    visitor.prompt.fill("")
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
    visitor = visit(site)
    page = visitor.page
    visitor.ask("A set")
    visitor.answer()
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
    assert visitor.text().strip()[:8] in log.evaluate("e => e.textContent")
    assert log.locator("p").count() <= 3  # not token by token
    visitor.open_all()
    for role, name in (
        ("spinbutton", "Temperature"), ("spinbutton", "Max tokens"), ("spinbutton", "Seed"),
        ("radio", "curl"), ("radio", "Python"), ("button", "Copy"), ("region", "Request"),
    ):  # fmt: skip
        expect(page.get_by_role(role, name=name, exact=True)).to_be_visible()
