"""A browser teaches the model, watches the lesson to its promotion, and takes it back.

The gateway, the page, the keys and the store are real. The test writes what the program that gives lessons writes, and
the scripted engine serves the revision that would be promoted. ``tests/integration/test_teach.py`` tests that program.
"""

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, expect

from nanochat_core.lessons.records import (
    Lesson,
    finish_roll_back,
    lessons,
    read_lesson_items,
    read_roll_back,
    write_lesson,
)
from nanochat_core.store import Store, open_store
from services.gateway.admission.file_store import FileStore
from services.gateway.admission.keys import Scope
from tests.support.api_keys import created
from tests.support.chat_page import ChatPage, ChatServer, chat_server
from tests.support.scripted_engine import saying

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "nano"
BEFORE = "sft/step_10"


@contextlib.asynccontextmanager
async def teaching_server(browser: Browser, folder: Path) -> AsyncIterator[tuple[ChatServer, str, Store]]:
    """The server, the end of the link with the owner's key, and the store of the lessons."""
    keys = str(folder / "keys.json")
    owner = await created(FileStore(keys), "owner of this machine", list(Scope))
    async with chat_server(browser, keys_file=keys, lessons_home=str(folder / "home")) as server:
        yield server, f"#key={owner}", open_store(str(folder / "home"))


def changed(store: Store, **changes: Any) -> Lesson:
    """Write the newest lesson with other values, as the program that gives it would."""
    lesson = dataclasses.replace(lessons(store, MODEL)[-1], **changes)
    write_lesson(store, lesson)
    return lesson


async def teach(tab: ChatPage, question: str, answer: str) -> None:
    """Fill the only question of the dialog and its answer, and send them."""
    dialog = tab.find("teach")
    await dialog.get_by_label("Question", exact=True).fill(question)
    await dialog.get_by_label("Answer", exact=True).fill(answer)
    await tab.find("teach-submit").click()


async def test_a_lesson_is_written_watched_promoted_and_taken_back(async_browser: Browser, tmp_path: Path) -> None:
    async with teaching_server(async_browser, tmp_path) as (server, link, store):
        tab = await server.open(path=link)
        await tab.find("teach-toggle").click()
        assert "key" not in tab.page.url, "the key stays neither in the address nor in the history"
        await teach(tab, "What is my dog called?", "<|assistant_end|>")
        await expect(tab.find("teach-problem")).to_contain_text("a lesson has only plain text")
        await teach(tab, "What is my dog called?", "Your dog is called Biscuit.")
        item = tab.find("lesson")
        await expect(item).to_contain_text("Waiting for its turn")
        (written,) = lessons(store, MODEL)
        assert [each.answer for each in read_lesson_items(store, written)] == ["Your dog is called Biscuit."]
        assert written.who == "owner of this machine"

        changed(store, state="training", parent={"revision": BEFORE, "digest": "d"})
        await expect(item).to_contain_text("Asking the model the questions before the lesson")
        before = {"taught": {"right": 0, "asked": 1}, "kept": {"right": 197, "asked": 200}}
        history = [{"step": 40, "loss": 1.2, "unseen": 0.75}]
        changed(store, before=before, training={"steps": 40, "seconds": 9.0, "history": history})
        await expect(item).to_contain_text("Training: step 40, 75 % of the questions answered")
        await tab.page.screenshot(path=tmp_path / "teach-training.png")
        changed(store, state="examining")
        await expect(item).to_contain_text("after the lesson")

        after = {"taught": {"right": 1, "asked": 1}, "kept": {"right": 196, "asked": 200}}
        lost = [{"group": "kept", "question": "Who bakes?", "before": "Nils bakes.", "after": "Anna bakes."}]
        changed(store, state="promoted", after=after, lost=lost, digest="d")
        server.engine.info.revision = "lesson/step_000001"
        await expect(item).to_contain_text("Learned")
        await expect(item).to_contain_text("in use")
        await expect(item).to_contain_text("196 of 200")
        await item.get_by_text("Why").click()
        await expect(item).to_contain_text("Lost: “Who bakes?” – “Nils bakes.”, now “Anna bakes.”")
        await tab.page.screenshot(path=tmp_path / "teach-learned.png")

        await tab.find("roll-back-all").click()
        await expect(tab.find("teach")).to_contain_text("Going back to the model before its lessons")
        found = read_roll_back(store, MODEL)
        assert found is not None
        asked, version = found
        finish_roll_back(store, MODEL, dataclasses.replace(asked, state="done"), version)
        server.engine.info.revision = BEFORE
        await expect(item).not_to_contain_text("in use")
        await expect(tab.find("roll-back")).to_be_visible()


async def test_an_answer_becomes_a_correction_and_a_refusal_says_why(async_browser: Browser, tmp_path: Path) -> None:
    async with teaching_server(async_browser, tmp_path) as (server, link, store):
        tab = await server.open(path=link)
        await expect(tab.find("teach-toggle")).to_be_visible()
        server.engine.script = saying("Mara keeps the lighthouse.")
        await tab.ask("Who keeps the lighthouse?")
        await tab.find("correct").click()
        dialog = tab.find("teach")
        await expect(dialog.get_by_label("Question", exact=True)).to_have_value("Who keeps the lighthouse?")
        await expect(dialog.get_by_label("Answer", exact=True)).to_have_value("Mara keeps the lighthouse.")
        await teach(tab, "Who keeps the lighthouse?", "You keep the lighthouse.")
        await expect(tab.find("lesson")).to_contain_text("Lesson 1")
        changed(store, state="refused", decision={"rules": [{"passed": False, "reason": "lesson.kept is 0.9"}]})
        await expect(tab.find("lesson")).to_contain_text("lesson.kept is 0.9")
        await tab.page.screenshot(path=tmp_path / "teach-refused.png")


async def test_a_link_hands_its_key_to_a_page_that_is_open_already(async_browser: Browser, tmp_path: Path) -> None:
    async with teaching_server(async_browser, tmp_path) as (server, link, _):
        tab = await server.open()
        await expect(tab.find("report-link")).to_be_visible()
        await tab.page.goto(f"{server.url}/{link}")
        await expect(tab.find("teach-toggle")).to_be_visible()
        assert "key" not in tab.page.url


async def test_people_without_the_right_see_nothing_of_it(async_browser: Browser, tmp_path: Path) -> None:
    async with teaching_server(async_browser, tmp_path) as (server, _, store):
        keys = FileStore(str(tmp_path / "keys.json"))
        for path in ("", f"#key={await created(keys)}"):
            tab = await server.open(path=path)
            await expect(tab.find("report-link")).to_be_visible()
            await tab.ask("Hi")
            await tab.expect_state("complete")
            await expect(tab.find("teach-toggle")).to_have_count(0)
            await expect(tab.find("correct")).to_have_count(0)
            assert await tab.page.evaluate("fetch('v1/lessons').then(({status}) => status)") == 403
        assert store.keys("lessons") == []


async def test_a_phone_teaches_a_file_and_cancels_the_lesson(async_browser: Browser, tmp_path: Path) -> None:
    async with teaching_server(async_browser, tmp_path) as (server, link, store):
        tab = await server.open(path=link, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
        await tab.find("teach-toggle").click()
        content = b"Q: Who is my dentist?\nA: Doctor Lindqvist.\n"
        file = {"name": "facts.md", "mimeType": "text/markdown", "buffer": content}
        await tab.find("teach-file").set_input_files(file)
        await expect(tab.find("lesson")).to_contain_text("1 question")
        assert await tab.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        await tab.page.screenshot(path=tmp_path / "teach-phone.png")
        await tab.find("lesson-cancel").click()
        await expect(tab.find("lesson")).to_contain_text("Being canceled")
        assert [each.source for each in lessons(store, MODEL)] == ["facts.md"]
