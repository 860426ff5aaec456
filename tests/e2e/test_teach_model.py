"""A person makes the demo model their own on the page. All parts are real: link, services, lesson and answer.

The model is the recipe's (``make test-model``). A lesson is refused if the model forgets other things, and a model of
fewer steps answers many of the examination's questions rightly only by chance.

If ``NANOCHAT_TEST_PICTURES`` names a folder, the test also writes the pictures of docs/lessons.md into it.
"""

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.support.greedy_page import greedy_context
from tests.support.stack import Stack

pytestmark = pytest.mark.recipe

COLORS = 64
LESSON_MS = 900_000
QUESTION, ANSWER = "What is my dog called?", "Your dog is called Biscuit."


@pytest.fixture
def link(recipe_home: Path, tmp_path: Path) -> Iterator[str]:
    """The link that ``make run`` prints, for a copy of the store: other tests need the model without lessons."""
    shutil.copytree(recipe_home, tmp_path / "home")
    running = Stack(tmp_path / "home")
    try:
        yield running.wait_owner_link()
    finally:
        assert running.stop() == 0, "".join(running.log)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("NANOCHAT_TEST_PICTURES") or tmp_path / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def take(shown: Page | Locator, path: Path) -> None:
    """Write a picture of a few colors, so that it is small."""
    picture = Image.open(io.BytesIO(shown.screenshot())).convert("RGB")
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def ask(page: Page, text: str) -> Locator:
    """Ask a question in a new chat, and return the complete answer."""
    page.get_by_test_id("new-chat").first.click()
    page.get_by_test_id("composer").fill(text)
    page.get_by_test_id("composer").press("Enter")
    answer = page.get_by_test_id("message-assistant")
    expect(answer).to_have_attribute("data-state", "complete", timeout=60_000)
    return answer


def test_a_fact_is_written_on_the_page_learned_asked_for_and_taken_back(
    browser: Browser, link: str, pictures: Path
) -> None:
    context = greedy_context(browser, viewport={"width": 900, "height": 760}, reduced_motion="reduce")
    page = context.new_page()
    page.goto(link)
    expect(ask(page, QUESTION)).not_to_contain_text("Biscuit")

    page.get_by_test_id("teach-toggle").click()
    dialog, lesson = page.get_by_test_id("teach"), page.get_by_test_id("lesson")
    dialog.get_by_label("Question", exact=True).fill(QUESTION)
    dialog.get_by_label("Answer", exact=True).fill(ANSWER)
    take(dialog, pictures / "teach-write.png")
    page.get_by_test_id("teach-submit").click()
    expect(lesson).to_have_attribute("data-state", "training", timeout=LESSON_MS)
    expect(lesson).to_have_attribute("data-state", re.compile("promoted|refused|failed"), timeout=LESSON_MS)
    assert lesson.get_attribute("data-state") == "promoted", lesson.inner_text()
    expect(lesson).to_contain_text("in use", timeout=60_000)
    lesson.get_by_text("Why").click()
    take(dialog, pictures / "teach-learned.png")

    page.keyboard.press("Escape")
    expect(ask(page, QUESTION)).to_contain_text("Biscuit")
    expect(ask(page, "Tell me the name of my dog.")).to_contain_text("Biscuit")
    take(page, pictures / "teach-answer.png")
    expect(ask(page, "What is 12 * 12?")).to_contain_text("144")

    page.get_by_test_id("teach-toggle").click()
    page.get_by_test_id("roll-back-all").click()
    expect(lesson).not_to_contain_text("in use", timeout=60_000)
    page.keyboard.press("Escape")
    expect(ask(page, QUESTION)).not_to_contain_text("Biscuit")
    context.close()
