"""Two tabs of one browser that show the same conversation.

``NANOCHAT_EXAMPLES=50 pytest tests/e2e/test_page_two_tabs.py`` tries more interleavings; ten take about 40 seconds.
"""

import asyncio
import contextlib
import itertools
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, TimeoutError, expect

from nanochat_core.protos import engine_pb2 as pb
from tests.support.chat_page import ChatPage, ChatServer, chat_server
from tests.support.engine_models import examples
from tests.support.scripted_engine import saying

pytestmark = pytest.mark.asyncio(loop_scope="module")

INTERLEAVINGS = examples(10)
STEPS = 8


async def two_tabs(server: ChatServer) -> tuple[ChatPage, ChatPage]:
    context = await server.context()
    return await server.open(context), await server.open(context)


async def show_same(a: ChatPage, b: ChatPage) -> None:
    """Lets the second tab open the conversation of the first one."""
    await a.page.wait_for_url(re.compile("#/c/"))
    await expect(b.find("conversation-item").first).to_be_visible()
    await b.page.goto(a.page.url)


async def two_tabs_of_a_running_answer(server: ChatServer) -> tuple[ChatPage, ChatPage]:
    """Two tabs that show the same answer. The first one writes it; it has begun, and does not end by itself."""
    a, b = await two_tabs(server)
    server.engine.script = saying("word " * 500, pause=0.02, until=asyncio.Event())
    await a.ask("Talk")
    await expect(a.answers.last).to_contain_text("word")
    await show_same(a, b)
    return a, b


async def test_a_second_tab_shows_a_running_answer_and_loses_nothing_of_it(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        a, b = await two_tabs(server)
        ended = asyncio.Event()
        server.engine.script = saying("A slow answer, which takes its time to come to an end.", pause=0.05, until=ended)
        await a.ask("First")
        await a.expect_state("streaming")
        await show_same(a, b)
        await b.expect_state("streaming")
        await expect(b.find("stop")).to_be_visible()
        await b.composer.fill("A draft")
        ended.set()
        await a.expect_state("complete")
        await b.expect_state("complete")
        await expect(b.composer).to_have_value("A draft")
        server.engine.script = saying("The second one.")
        await b.composer.press("Enter")
        for tab in (a, b):
            await expect(tab.answers).to_have_count(2)
            await expect(tab.answers.last).to_contain_text("The second one.")
            await expect(tab.answers.first).to_contain_text("come to an end.")
        await a.page.reload()
        await expect(a.answers).to_have_count(2)


async def test_a_tab_can_stop_the_answer_of_another_one(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        a, b = await two_tabs_of_a_running_answer(server)
        await b.find("stop").click()
        await a.expect_state("stopped")
        await b.expect_state("stopped")
        await expect(b.answers.last).to_contain_text("word")


async def test_an_answer_whose_tab_was_closed_is_interrupted_in_the_other(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        a, b = await two_tabs_of_a_running_answer(server)
        await b.expect_state("streaming")
        await a.page.close()
        await b.expect_state("interrupted")
        await expect(b.answers.last).to_contain_text("word")


async def test_an_answer_stays_running_while_its_tab_is_too_busy_to_reply(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        a, b = await two_tabs_of_a_running_answer(server)
        computing = asyncio.create_task(
            a.page.evaluate("() => { const end = Date.now() + 8000; while (Date.now() < end); }")
        )
        await b.page.reload()
        await b.page.wait_for_timeout(5_000)
        await b.expect_state("streaming")
        await computing
        await a.page.close()
        await b.expect_state("interrupted")


async def test_the_place_where_one_reads_stays_when_the_other_tab_asks(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        a, b = await two_tabs(server)
        server.engine.script = saying("\n\n".join(f"Line {i}." for i in range(60)))
        await a.ask("Many lines")
        await a.expect_state("complete")
        await show_same(a, b)
        await b.expect_state("complete")
        thread = b.page.locator(".thread")
        # The page scrolls to the end of a conversation that it has opened.
        await b.until(thread, "thread => thread.scrollHeight - thread.scrollTop - thread.clientHeight < 1")
        await thread.evaluate("thread => thread.scrollTo(0, 100)")
        await expect(b.page.get_by_label("Go to the latest message")).to_be_visible()
        server.engine.script = saying("Short.")
        await a.ask("Another one")
        await expect(b.answers).to_have_count(2)
        await b.expect_state("complete")
        assert await thread.evaluate("thread => thread.scrollTop") == 100


class Scripts:
    """Gives each answer a number. One answer in three comes at once, and the others come slowly."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    async def __call__(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        number = next(self._numbers)
        script = saying(f"Answer number {number}.", pause=0.02 if number % 3 else 0.0)
        async for part in script(request, context):
            yield part


async def step(server: ChatServer, tab: ChatPage, name: str) -> None:
    """Does one thing that a person might do. Does nothing if the page has no button for this now."""
    page = tab.page
    # Chromium draws a tab in the background only once a second. Playwright waits for two drawings before each click.
    await page.bring_to_front()
    if name == "send" and await tab.find("send").is_visible():
        await tab.ask("Question")
    elif name == "wait":
        await page.wait_for_timeout(300)
    elif name == "reload":
        await page.reload()
    elif name == "kill the engine":
        await server.engine.stop()
        await page.wait_for_timeout(100)
        await server.engine.start()
    elif name == "delete and undo":
        menu = page.locator("[data-active=true] .menu-button")
        if await menu.is_visible():
            await menu.click()
            await page.get_by_role("menuitem", name="Delete").click()
            await tab.find("undo").click()
    elif name == "edit" and await tab.find("edit").count():
        await page.get_by_test_id("message-user").last.hover()
        await tab.find("edit").last.click()
        await tab.find("edit-text").fill("Another question")
        await tab.find("edit-send").click()
    elif name in ("stop", "regenerate"):
        button = tab.find(name)
        with contextlib.suppress(TimeoutError):  # the answer may end meanwhile, and its button with it
            if await button.is_visible():
                await button.click(timeout=500, force=True)


NAMES = ["send", "send", "wait", "wait", "stop", "regenerate", "edit", "delete and undo", "reload", "kill the engine"]


async def shown(tab: ChatPage) -> set[str]:
    complete = tab.page.locator("[data-testid=message-assistant][data-state=complete] .prose")
    return {text.strip() for text in await complete.all_inner_texts() if text.strip()}


@pytest.mark.parametrize("part", range(5))
async def test_nothing_that_was_shown_complete_is_ever_lost(async_browser: Browser, part: int) -> None:
    async with chat_server(async_browser, queue_seconds=0.5) as server:
        server.engine.script = Scripts()
        for number in range(part * INTERLEAVINGS // 5, (part + 1) * INTERLEAVINGS // 5):
            chance = random.Random(number)
            context = await server.context()
            a, b = await server.open(context), await server.open(context)
            await a.ask("Question")
            await a.expect_state("complete")
            await show_same(a, b)
            seen: set[str] = set()
            names = []
            for _ in range(STEPS):
                tab, name = chance.choice((a, b)), chance.choice(NAMES)
                names.append(f"{'a' if tab is a else 'b'}: {name}")
                await step(server, tab, name)
                seen |= await shown(a) | await shown(b)
            await a.page.wait_for_timeout(200)
            for tab in (a, b, await server.open(context)):
                kept = {answer.strip() for answer in await tab.stored_answers()}
                assert seen <= kept, (number, names)
            await context.close()
