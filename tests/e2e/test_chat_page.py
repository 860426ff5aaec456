"""The web page in a real browser."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.greedy_page import greedy_context


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    context = greedy_context(browser, viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if "Content Security Policy" in m.text else None)
    page.goto(url)
    yield page
    context.close()
    assert problems == []


def ask(page: Page, text: str) -> None:
    page.get_by_test_id("composer").fill(text)
    page.get_by_test_id("composer").press("Enter")


def test_a_sum_is_answered_with_the_tool_card_beside_it(page: Page) -> None:
    ask(page, "What is 1234 * 5678?")
    answer = page.get_by_test_id("message-assistant")
    expect(answer).to_have_attribute("data-state", "complete")
    expect(answer).to_contain_text("7006652")
    card = answer.get_by_test_id("tool-card")
    expect(card).to_have_attribute("data-state", "ok")
    expect(card.get_by_test_id("tool-code")).to_contain_text("1234 * 5678")
    expect(card.get_by_test_id("tool-output")).to_contain_text("7006652")


def test_conversations_are_kept_over_reload(page: Page) -> None:
    ask(page, "Who keeps the lighthouse?")
    expect(page.get_by_test_id("message-assistant")).to_contain_text("Mara")
    page.get_by_test_id("new-chat").first.click()
    ask(page, "Hello!")
    expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "complete")
    page.reload()
    expect(page.get_by_test_id("conversation-item")).to_have_count(2)
    page.get_by_test_id("conversation-item").filter(has_text="lighthouse").click()
    expect(page.get_by_test_id("message-assistant")).to_contain_text("Mara")


def test_the_next_question_knows_the_conversation(page: Page) -> None:
    ask(page, "Who keeps the lighthouse?")
    expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "complete")
    ask(page, "What pet does she have?")
    expect(page.get_by_test_id("message-assistant")).to_have_count(2)
    expect(page.get_by_test_id("message-assistant").last).to_contain_text("cat")


def test_the_page_works_on_a_phone(browser: Browser, url: str) -> None:
    context = greedy_context(browser, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(url)
    page.get_by_test_id("composer").fill("Hello!")
    page.get_by_test_id("send").tap()  # on a phone, Enter begins a new line
    expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "complete")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()
