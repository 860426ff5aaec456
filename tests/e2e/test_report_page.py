"""The report of the demo model in a real browser."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect


@pytest.fixture(params=["light", "dark"])
def page(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=request.param)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.goto(url)
    yield page
    context.close()
    assert problems == []


def test_the_chat_page_leads_to_the_report_and_its_plots_are_there(page: Page) -> None:
    with page.context.expect_page() as opened:
        page.get_by_test_id("report-link").click()
    report = opened.value
    problems: list[str] = []
    report.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    expect(report.get_by_test_id("report")).to_have_attribute("data-state", "report")
    expect(report.locator("article h2")).to_have_text("demo: report")
    expect(report.get_by_role("heading", name="Held-out conversations")).to_be_visible()
    expect(report.get_by_test_id("other-revision")).to_have_count(0)
    pictures = report.locator("article img")
    expect(pictures).to_have_count(3)
    # The page forbids eval, so each picture is awaited by itself: wait_for_function uses eval if its first try fails.
    for picture in pictures.all():
        expect(picture).to_have_js_property("complete", True)
    assert all(width > 400 for width in pictures.evaluate_all("all => all.map((i) => i.naturalWidth)"))
    assert {source.rpartition("/")[2] for source in pictures.evaluate_all("all => all.map((i) => i.src)")} == {
        "loss.png",
        "schedule.png",
        "conversations.png",
    }
    assert report.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert problems == []


def test_the_report_works_on_a_phone(browser: Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(f"{url}/report")
    expect(page.get_by_test_id("report")).to_have_attribute("data-state", "report")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()
