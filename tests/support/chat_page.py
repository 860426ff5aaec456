"""The built chat page in a browser, served by a real gateway in front of a scripted engine."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from playwright.async_api import Browser, BrowserContext, Locator, Page, expect

from tests.support.scripted_engine import ScriptedEngine, running_engine, running_gateway, until_ready
from tests.support.stack import ROOT

STATIC = ROOT / "services/gateway/static"


class ChatPage:
    """One tab with the chat page. ``problems`` lists script errors and violations of the Content-Security-Policy."""

    def __init__(self, page: Page, url: str, problems: list[str]) -> None:
        self.page = page
        self.url = url
        self.problems = problems

    def find(self, test_id: str) -> Locator:
        return self.page.get_by_test_id(test_id)

    @property
    def composer(self) -> Locator:
        return self.find("composer")

    @property
    def answers(self) -> Locator:
        return self.find("message-assistant")

    async def ask(self, text: str) -> None:
        """Sends a message without waiting for its answer."""
        await self.composer.fill(text)
        await self.composer.press("Enter")

    async def expect_state(self, state: str) -> None:
        """Waits until the last answer is in this state."""
        await expect(self.answers.last).to_have_attribute("data-state", state)

    async def until(self, found: Locator, condition: str) -> None:
        """Waits until a JavaScript function returns true for the element."""
        async with asyncio.timeout(30):
            while not await found.evaluate(condition):
                await asyncio.sleep(0.05)

    async def stored_answers(self) -> list[str]:
        """The texts of all complete answers in the browser's storage, including every version of an answer."""
        entries = await self.page.evaluate(
            "() => Object.keys(localStorage).filter((key) => key.startsWith('nanochat.message.'))"
            ".map((key) => localStorage.getItem(key))"
        )
        messages = [json.loads(entry) for entry in entries]
        return [message["content"] for message in messages if message.get("state") == "complete"]


class ChatServer:
    """A gateway with the built page, and the scripted engine behind it."""

    def __init__(self, browser: Browser, engine: ScriptedEngine, url: str) -> None:
        self.browser = browser
        self.engine = engine
        self.url = url
        self.problems: list[str] = []

    async def context(self, **options: Any) -> BrowserContext:
        """A browser with a storage of its own."""
        return await self.browser.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **options}
        )

    async def open(self, context: BrowserContext | None = None, path: str = "", **options: Any) -> ChatPage:
        """Opens a tab, in a new browser if ``context`` is not given."""
        page = await (context or await self.context(**options)).new_page()
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda m: self.problems.append(m.text) if "Content Security Policy" in m.text else None)
        await page.goto(f"{self.url}/{path}")
        return ChatPage(page, self.url, self.problems)


@contextlib.asynccontextmanager
async def served_page(*, context_length: int = 4096, **settings: Any) -> AsyncIterator[tuple[ScriptedEngine, str]]:
    """Runs a gateway with the built page, in front of a scripted engine. Yields the engine and the page's URL."""
    assert (STATIC / "index.html").is_file(), "the page is not built: make services/gateway/static/index.html"
    async with (
        running_engine(context_length=context_length) as engine,
        running_gateway(engine.address, static=STATIC, **settings) as url,
    ):
        await until_ready(url)
        yield engine, url


@contextlib.asynccontextmanager
async def chat_server(browser: Browser, **options: Any) -> AsyncIterator[ChatServer]:
    """Runs the server until the ``with`` block ends. Raises AssertionError if a tab had a problem."""
    async with served_page(**options) as (engine, url):
        server = ChatServer(browser, engine, url)
        try:
            yield server
        finally:
            for context in browser.contexts:
                await context.close()
        assert server.problems == []
