"""The trace below an answer: by keyboard, on a phone, and without a source that is off."""

import pytest
from playwright.sync_api import expect


@pytest.fixture(scope="module")
def traced(serving, merged, owners):
    with serving(merged, trace_owners=owners[0]) as server:
        yield server.url


def test_an_answer_is_traced_on_demand(traced, owners, visit):
    visitor = visit(traced, viewport={"width": 390, "height": 800})
    page = visitor.page
    visitor.ask()
    text = visitor.text()
    before = len(owners[1]["math"])
    button = page.get_by_role("button", name="Trace its words")
    button.press("Enter")
    panel = page.get_by_role("region", name="Trace of the answer")
    expect(panel).to_be_focused()
    assert owners[1]["math"][before:] == [text]  # nobody was asked before
    expect(panel).to_contain_text("documents of math, by what their owners let be said")
    expect(panel).to_contain_text("code (no answer within 1 s)")
    expect(page.get_by_role("log")).to_contain_text("One span of this answer")
    assert panel.locator("> .text").evaluate("box => box.textContent") == text

    found = panel.locator(".found")
    assert found.evaluate("mark => mark.textContent") == text[:3]
    place = panel.locator(".places li")
    expect(place).to_contain_text("d7 · a book CC0-1.0")
    assert (
        place.locator("blockquote").evaluate("q => q.textContent") == f"…before {text[:3]} after…"
    )
    page.keyboard.press("Tab")
    expect(found).to_be_focused()
    page.keyboard.press("Enter")
    expect(found).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the words in the list lead back to the answer
    expect(found).to_be_focused()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_nobody_is_asked_whose_source_is_off(traced, site, owners, visit):
    visitor = visit(traced)
    before = len(owners[1]["math"])
    for name in ("math", "code"):
        visitor.switch(name).click()
    visitor.ask()
    visitor.answer()
    expect(visitor.page.get_by_role("button", name="Trace its words")).to_have_count(0)
    visitor.switch("code").click()
    visitor.ask()
    visitor.answer()
    visitor.page.get_by_role("button", name="Trace its words").click()
    expect(visitor.page.locator(".traced")).to_contain_text("Not heard: code")
    assert len(owners[1]["math"]) == before
    plain = visit(site)
    plain.ask()
    plain.answer()
    expect(plain.page.get_by_role("button", name="Trace its words")).to_have_count(0)
