"""The chat page in Firefox and in WebKit, the engine of Safari: what each browser might do in its own way.

``make test-browsers`` installs the browsers and runs these tests.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from selenium.webdriver.common.keys import Keys

from nanochat_core.protos import engine_pb2 as pb
from tests.support.chat_page import served_page
from tests.support.other_browsers import (
    ANSWER,
    COMPOSER,
    CONVERSATION,
    LAST_ANSWER,
    OtherBrowser,
    Tab,
    labeled,
    missing_programs,
    other_browser,
    with_id,
)
from tests.support.scripted_engine import TOKENIZER, ScriptedEngine, failing, http_client, saying
from tests.support.waiting import until

pytestmark = [pytest.mark.browsers, pytest.mark.asyncio(loop_scope="module")]

CODE = "Look at this:\n\n```python\n" + f"# a {'very ' * 50}long line\n" + "print(1)\n" * 400 + "```\n\nDone."


@pytest_asyncio.fixture(params=["firefox", "webkit"], loop_scope="module")
async def browser(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OtherBrowser]:
    if missing := missing_programs(request.param):
        pytest.skip(f"not on this machine: {', '.join(missing)}; tests/install-browsers installs the browsers")
    async with other_browser(request.param, tmp_path) as running:
        yield running


async def test_a_failing_server_destroys_no_answer(browser: OtherBrowser) -> None:
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        engine.script = saying("The good answer.")
        await tab.ask("Hi")
        await tab.expect_state("complete")
        engine.script = failing(grpc.StatusCode.INTERNAL, "broken", after=saying("Half of"))
        await tab.click(with_id("regenerate"))
        await tab.expect_state("interrupted")
        for _ in range(2):
            await tab.expect_text(with_id("versions"), "2/2")
            await tab.click(labeled("Earlier version"))
            await tab.expect_text(LAST_ANSWER, "The good answer.")
            await tab.expect_text(with_id("versions"), "1/2")
            await tab.reload()  # the chosen version is kept
            await tab.expect_text(LAST_ANSWER, "The good answer.")
            await tab.click(labeled("Later version"))
            await tab.expect_text(LAST_ANSWER, "Half of")


async def test_an_edited_question_keeps_what_followed_the_old_one(browser: OtherBrowser) -> None:
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        for count, number in enumerate(("one", "two"), start=1):
            engine.script = saying(f"Answer {number}.")
            await tab.ask(f"Question {number}")
            await tab.expect_count(f"{ANSWER}[data-state=complete]", count)
        engine.script = saying("Answer three.")
        await tab.click(with_id("edit"))
        await tab.type(with_id("edit-text"), " again", Keys.ENTER)
        await tab.expect_count(ANSWER, 1)
        await tab.expect_text(LAST_ANSWER, "Answer three.")
        await tab.expect_text(with_id("message-user"), "Question one again")
        await tab.click(labeled("Earlier version"))
        await tab.expect_count(ANSWER, 2)
        await tab.expect_text(LAST_ANSWER, "Answer two.")


async def test_the_block_being_written_can_be_copied_selected_and_scrolled(browser: OtherBrowser) -> None:
    lines = "() => document.querySelector('.answer pre')?.textContent.split('\\n').length"
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        engine.script = saying(CODE, pause=0.01, until=asyncio.Event())
        await tab.ask("Code")
        await tab.until(f"() => ({lines})() > 5")
        selected = await tab.run(
            "() => { const pre = document.querySelector('.answer pre'); pre.scrollTo(30, 0);"
            "const text = document.createTreeWalker(pre, NodeFilter.SHOW_TEXT).nextNode();"
            "getSelection().setBaseAndExtent(text, 0, text, text.data.length); return getSelection().toString(); }"
        )
        # The button says for a short time only that it has copied, so the page itself keeps what the button said.
        await tab.run(
            "() => { const copy = document.querySelector('[data-copy]'); window.said = [];"
            "new MutationObserver(() => said.push(copy.textContent)).observe(copy, { childList: true }); }"
        )
        await tab.click("[data-copy]")
        await tab.until("() => said.includes('Copied')")
        before = await tab.run(lines)
        await tab.until(f"(before) => ({lines})() > before + 2", before)
        assert await tab.run("() => getSelection().toString()") == selected != ""
        assert await tab.run("() => document.querySelector('.answer pre').scrollLeft") == 30
        await tab.expect_state("streaming")
        await tab.click(COMPOSER)
        await tab.press("v", control=True)
        await tab.until("(selector) => document.querySelector(selector).value.includes('print(1)')", COMPOSER)
        await tab.click(with_id("stop"))
        await tab.expect_state("stopped")


async def test_following_the_end_lets_go_at_the_slightest_scroll(browser: OtherBrowser) -> None:
    thread = "const thread = document.querySelector('.thread');"
    at_end = f"() => {{ {thread} return thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60; }}"
    to_end = labeled("Go to the latest message")
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        engine.script = saying("\n\n".join(f"Paragraph {i}" for i in range(2000)), pause=0.005)
        await tab.ask("Talk")
        await tab.expect_text(LAST_ANSWER, "Paragraph 30")
        await tab.until(at_end)  # the view follows the end of the answer
        await tab.scroll(".thread", -3)
        await tab.expect_count(to_end, 1)
        top, height = await tab.run(f"() => {{ {thread} return [thread.scrollTop, thread.scrollHeight]; }}")
        await tab.until(f"(height) => {{ {thread} return thread.scrollHeight > height + 300; }}", height)
        await tab.expect_state("streaming")
        # The rest of an animated scroll of three pixels may have come meanwhile.
        assert top - 3 <= await tab.run(f"() => {{ {thread} return thread.scrollTop; }}") <= top
        await tab.click(to_end)
        await tab.until(at_end)
        await tab.click(with_id("stop"))
        await tab.expect_state("stopped")


async def test_a_second_tab_shows_a_running_answer_and_loses_nothing_of_it(browser: OtherBrowser) -> None:
    async with served_page() as (engine, url):
        a, b = await browser.open(url), await browser.open(url)
        ended = asyncio.Event()
        engine.script = saying("A slow answer, which takes its time to come to an end.", pause=0.05, until=ended)
        await a.ask("First")
        await a.expect_state("streaming")
        await b.click(CONVERSATION)
        await b.expect_state("streaming")
        await b.expect_count(with_id("stop"), 1)
        await b.type(COMPOSER, "A draft")
        ended.set()
        for tab in (a, b):
            await tab.expect_state("complete")
        await b.expect_value(COMPOSER, "A draft")
        engine.script = saying("The second one.")
        await b.type(COMPOSER, Keys.ENTER)
        for tab in (a, b):
            await tab.expect_count(ANSWER, 2)
            await tab.expect_text(LAST_ANSWER, "The second one.")
            await tab.expect_text(ANSWER, "come to an end.")
        await a.reload()
        await a.expect_count(f"{ANSWER}[data-state=complete]", 2)


async def two_tabs_of_a_running_answer(browser: OtherBrowser, engine: ScriptedEngine, url: str) -> tuple[Tab, Tab]:
    """Two tabs that show the same answer. The first one writes it; it has begun, and does not end by itself."""
    a, b = await browser.open(url), await browser.open(url)
    engine.script = saying("word " * 500, pause=0.02, until=asyncio.Event())
    await a.ask("Talk")
    await a.expect_text(LAST_ANSWER, "word")
    await b.click(CONVERSATION)
    return a, b


async def test_a_tab_can_stop_the_answer_of_another_one(browser: OtherBrowser) -> None:
    async with served_page() as (engine, url):
        a, b = await two_tabs_of_a_running_answer(browser, engine, url)
        await b.click(with_id("stop"))
        for tab in (a, b):
            await tab.expect_state("stopped")
            await tab.expect_text(LAST_ANSWER, "word")


async def test_an_answer_whose_tab_was_closed_is_interrupted_in_the_other(browser: OtherBrowser) -> None:
    async with served_page() as (engine, url):
        a, b = await two_tabs_of_a_running_answer(browser, engine, url)
        await b.expect_state("streaming")
        await a.close()
        await b.expect_state("interrupted")
        await b.expect_text(LAST_ANSWER, "word")


async def test_drafts_survive_a_reload_each_in_its_conversation(browser: OtherBrowser) -> None:
    async with served_page() as (_engine, url):
        tab = await browser.open(url)
        await tab.ask("Hi")
        await tab.expect_state("complete")
        await tab.type(COMPOSER, "In the conversation")
        await tab.click(with_id("new-chat"))
        await tab.expect_value(COMPOSER, "")
        await tab.type(COMPOSER, "In a new chat")
        await tab.reload()
        await tab.expect_value(COMPOSER, "In a new chat")
        await tab.click(CONVERSATION)
        await tab.expect_value(COMPOSER, "In the conversation")


async def test_the_enter_of_an_input_method_never_sends(browser: OtherBrowser) -> None:
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        await tab.click(COMPOSER)
        await tab.run(
            "(selector) => { window.seen = []; for (const kind of ['compositionend', 'keydown'])"
            "document.querySelector(selector).addEventListener(kind, (event) => seen.push([kind, event.keyCode])); }",
            COMPOSER,
        )
        await tab.compose()
        await tab.until("() => seen.some(([kind]) => kind === 'compositionend')")
        await tab.expect_value(COMPOSER, "に")
        assert ["keydown", 229] in await tab.run("() => seen")
        # Safari ends the composition first. Its Enter comes afterwards, with the key code of an input method.
        await tab.run(
            "(selector) => { document.querySelector(selector).dispatchEvent(new KeyboardEvent('keydown', "
            "{ key: 'Enter', keyCode: 229, bubbles: true, cancelable: true })); }",
            COMPOSER,
        )
        await tab.expect_value(COMPOSER, "に")
        await tab.expect_count(ANSWER, 0)
        await tab.press(Keys.ENTER)
        await tab.expect_state("complete")
        await tab.expect_text(with_id("message-user"), "に")
        assert len(engine.requests) == 1


async def test_an_answer_that_was_cut_off_goes_on(browser: OtherBrowser) -> None:
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        engine.script = saying("The beginning, ", finish=pb.FINISH_REASON_LENGTH)
        await tab.ask("Talk")
        await tab.expect_text(LAST_ANSWER, "Cut off at the length limit")
        engine.script = saying("and the end.")
        await tab.click(with_id("continue"))
        await tab.expect_text(LAST_ANSWER, "The beginning, and the end.")
        assert TOKENIZER.decode(engine.requests[-1].prompt_token_ids).endswith("The beginning, ")
        await tab.expect_count(with_id("continue"), 0)


async def test_everything_can_be_taken_to_another_browser(browser: OtherBrowser, tmp_path: Path) -> None:
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        engine.script = saying("First.")
        await tab.ask("Hi")
        await tab.expect_state("complete")
        engine.script = saying("Second.")
        await tab.click(with_id("regenerate"))
        await tab.expect_text(LAST_ANSWER, "Second.")
        await tab.expect_state("complete")
        await tab.click(with_id("settings-toggle"))
        await tab.click(with_id("export-all"))
        await until(lambda: any(map(_is_complete, browser.downloads.glob("nanochat-*.json"))), 30)
        [file] = browser.downloads.glob("nanochat-*.json")
        (tmp_path / "other").mkdir()
        async with other_browser(browser.name, tmp_path / "other") as other:
            tab = await other.open(url)
            await tab.click(with_id("settings-toggle"))
            await tab.type(with_id("import"), str(file))
            await tab.expect_text("[role=status]", "Imported 1 conversation.")
            await tab.press(Keys.ESCAPE)
            await tab.click(CONVERSATION)
            await tab.expect_text(LAST_ANSWER, "Second.")
            await tab.click(labeled("Earlier version"))
            await tab.expect_text(LAST_ANSWER, "First.")


def _is_complete(file: Path) -> bool:
    """Whether the browser has written the whole file."""
    try:
        json.loads(file.read_text())
    except ValueError:
        return False
    return True


async def test_mathematics_is_typeset_under_the_pages_own_policy(browser: OtherBrowser) -> None:
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        engine.script = saying(r"So \(x^2\) is 2*3*4, and" + "\n\n" + r"\[ \int_0^1 \sqrt{x}\,dx = \frac{2}{3} \]")
        await tab.ask("Sum")
        await tab.expect_state("complete")
        # The formula is only this high if the styles that KaTeX sets have an effect.
        await tab.until("() => document.querySelector('.katex-display .katex-html')?.clientHeight > 20")
        await tab.until(
            "() => [...document.fonts].some((font) => /KaTeX_Main/.test(font.family) && font.status === 'loaded')"
        )
        await tab.expect_text(LAST_ANSWER, "2*3*4")
        await tab.expect_count(".answer em", 0)


async def test_the_button_and_escape_stop_an_answer(browser: OtherBrowser) -> None:
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        engine.script = saying("word " * 500, pause=0.02, until=asyncio.Event())
        for number, way in enumerate(("button", "Escape"), start=1):
            await tab.ask("Talk")
            await tab.expect_count(ANSWER, number)
            await tab.expect_text(LAST_ANSWER, "word")
            await (tab.click(with_id("stop")) if way == "button" else tab.press(Keys.ESCAPE))
            await tab.expect_state("stopped")
            async with asyncio.timeout(30):
                await engine.cancelled.acquire()
            await tab.expect_text(LAST_ANSWER, "word")


async def test_a_message_that_was_sent_while_the_model_loads_waits_for_it(browser: OtherBrowser) -> None:
    async with served_page(queue_seconds=0.3) as (engine, url):
        tab = await browser.open(url)
        await engine.stop()
        await tab.ask("Are you there?")
        await tab.expect_count(f"{with_id('banner')}[data-state=loading]", 1)
        refused = 'nanochat_gateway_requests_total{route="/v1/chat/completions",status="503"}'
        async with http_client(url) as http, asyncio.timeout(30):
            while refused not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.05)
        await tab.expect_state("streaming")
        engine.script = saying("Yes.")
        await engine.start()
        await tab.expect_text(LAST_ANSWER, "Yes.")


async def test_a_conversation_that_outgrows_the_context_gets_a_mark(browser: OtherBrowser) -> None:
    async with served_page(context_length=256) as (engine, url):
        tab = await browser.open(url)
        for number in range(10):
            engine.script = saying(f"This is answer {number}.")
            await tab.ask(f"And this is question {number}.")
            await tab.expect_count(ANSWER, number + 1)
            await tab.expect_state("complete")
        await tab.expect_count(with_id("memory-mark"), 1)
        await tab.expect_count("[role=alert]", 0)
        prompt = TOKENIZER.decode(engine.requests[-1].prompt_token_ids)
        assert "question 9" in prompt
        assert "question 0" not in prompt


async def test_the_keyboard_map_and_the_shortcuts(browser: OtherBrowser) -> None:
    async with served_page() as (_engine, url):
        tab = await browser.open(url)
        keyboard = f"{with_id('keyboard')}[open]"
        await tab.type(COMPOSER, "?")
        await tab.expect_value(COMPOSER, "?")
        await tab.run("() => document.activeElement.blur()")
        await tab.press("?")
        await tab.expect_text(keyboard, "New chat")
        await tab.press(Keys.ESCAPE)
        await tab.expect_count(keyboard, 0)
        await tab.run("() => document.activeElement.blur()")
        await tab.press("/")
        await tab.until("(selector) => document.activeElement.matches(selector)", COMPOSER)
        await tab.press(Keys.ENTER)
        await tab.expect_state("complete")
        await tab.expect_text(f"{with_id('message-user')} .bubble", "?")
        await tab.press("k", control=True)
        await tab.expect_count(ANSWER, 0)


async def test_right_to_left_text_reads_from_the_right(browser: OtherBrowser) -> None:
    blocks = "[...document.querySelectorAll('.bubble, .answer .block')]"
    directions = f"() => {blocks}.map((block) => getComputedStyle(block).direction)"
    async with served_page() as (engine, url):
        tab = await browser.open(url)
        engine.script = saying("שלום עולם\n\nHello world")
        await tab.ask("مرحبا")
        await tab.expect_state("complete")
        assert await tab.run(directions) == ["rtl", "rtl", "ltr"]


async def test_a_text_that_no_model_can_read_is_not_pasted(browser: OtherBrowser) -> None:
    async with served_page() as (_engine, url):
        tab = await browser.open(url)
        await tab.click(COMPOSER)
        await tab.paste("word " * 1_000_000)
        await tab.expect_text("[role=status]", "5,000,000 characters")
        await tab.expect_value(COMPOSER, "")
