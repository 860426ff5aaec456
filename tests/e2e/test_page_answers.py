"""What the chat page does with answers: versions, long conversations, text that is still being written."""

import asyncio
import re
from pathlib import Path

import grpc
import pytest
from playwright.async_api import Browser, Locator, expect

from nanochat_core.protos import engine_pb2 as pb
from tests.support.chat_page import ChatPage, chat_server
from tests.support.scripted_engine import TOKENIZER, failing, saying

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The engine writes these lines for more than a minute.
LINES = [f"# a {'very ' * 30}long line", *(f"print({i})  # line {i}" for i in range(400))]
CODE = "Look at this:\n\n```python\n" + "\n".join(LINES) + "\n```\n\nDone."


async def test_a_failing_server_destroys_no_answer(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        tab = await server.open()
        server.engine.script = saying("The good answer.")
        await tab.ask("Hi")
        await tab.expect_state("complete")
        server.engine.script = failing(grpc.StatusCode.INTERNAL, "broken", after=saying("Half of"))
        await tab.find("regenerate").click()
        await tab.expect_state("interrupted")
        for _ in range(2):
            await expect(tab.find("versions")).to_have_text("2/2")
            await tab.page.get_by_label("Earlier version").click()
            await expect(tab.answers.last).to_contain_text("The good answer.")
            await expect(tab.find("versions")).to_have_text("1/2")
            await tab.page.reload()  # the chosen version is kept
            await expect(tab.answers.last).to_contain_text("The good answer.")
            await tab.page.get_by_label("Later version").click()
            await expect(tab.answers.last).to_contain_text("Half of")


async def test_an_edited_question_keeps_what_followed_the_old_one(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        tab = await server.open()
        for number in ("one", "two"):
            server.engine.script = saying(f"Answer {number}.")
            await tab.ask(f"Question {number}")
            await tab.expect_state("complete")
        server.engine.script = saying("Answer three.")
        await tab.find("message-user").first.hover()
        await tab.find("edit").first.click()
        await tab.find("edit-text").fill("Question three")
        await tab.find("edit-text").press("Enter")
        await expect(tab.answers).to_have_count(1)
        await expect(tab.answers.last).to_contain_text("Answer three.")
        await tab.page.get_by_label("Earlier version").click()
        await expect(tab.answers).to_have_count(2)
        await expect(tab.answers.last).to_contain_text("Answer two.")


async def test_an_answer_that_was_cut_off_goes_on(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        tab = await server.open()
        server.engine.script = saying("The beginning, ", finish=pb.FINISH_REASON_LENGTH)
        await tab.ask("Talk")
        await expect(tab.answers.last).to_contain_text("Cut off at the length limit")
        server.engine.script = saying("and the end.")
        await tab.find("continue").click()
        await expect(tab.answers.last).to_contain_text("The beginning, and the end.")
        assert TOKENIZER.decode(server.engine.requests[-1].prompt_token_ids).endswith("The beginning, ")
        await expect(tab.find("continue")).to_have_count(0)


async def test_a_conversation_of_60_turns_goes_on_and_knows_the_last_turns(async_browser: Browser) -> None:
    async with chat_server(async_browser, context_length=1024) as server:
        tab = await server.open()
        for number in range(60):
            server.engine.script = saying(f"This is answer {number}.")
            await tab.ask(f"And this is question {number}.")
            await expect(tab.answers).to_have_count(number + 1)
            await tab.expect_state("complete")
        await expect(tab.find("memory-mark")).to_have_count(1)
        await expect(tab.page.get_by_role("alert")).to_have_count(0)
        prompt = TOKENIZER.decode(server.engine.requests[-1].prompt_token_ids)
        assert "question 59" in prompt
        assert "answer 57" in prompt
        assert "question 0." not in prompt


async def test_a_message_that_is_too_long_by_itself_says_so(async_browser: Browser) -> None:
    async with chat_server(async_browser, context_length=256) as server:
        tab = await server.open()
        await tab.ask("x" * 1000)
        await expect(tab.page.get_by_role("alert")).to_contain_text("Your message is longer than the model can read")
        await expect(tab.page.get_by_role("alert")).to_contain_text("256")
        server.engine.script = saying("Better.")
        await tab.ask("short")
        await expect(tab.answers.last).to_contain_text("Better.")


async def test_a_message_that_was_sent_while_the_model_loads_waits_for_it(async_browser: Browser) -> None:
    async with chat_server(async_browser, queue_seconds=0.3) as server:
        tab = await server.open()
        await server.engine.stop()
        await tab.ask("Are you there?")
        await expect(tab.find("banner")).to_have_attribute("data-state", "loading")
        await asyncio.sleep(3)  # longer than the gateway lets a request wait
        await tab.expect_state("streaming")
        server.engine.script = saying("Yes.")
        await server.engine.start()
        await expect(tab.answers.last).to_contain_text("Yes.")


async def writing(tab: ChatPage) -> None:
    """Waits until the answer with the code has some lines and is still being written."""
    await expect(tab.page.locator(".answer pre")).to_contain_text("line 5")
    await tab.expect_state("streaming")


async def test_the_block_being_written_can_be_copied_selected_and_scrolled(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        context = await server.context()
        await context.grant_permissions(["clipboard-read", "clipboard-write"])
        tab = await server.open(context)
        server.engine.script = saying(CODE, pause=0.01, until=asyncio.Event())
        await tab.ask("Code")
        await writing(tab)
        pre = tab.page.locator(".answer pre")
        await pre.evaluate("pre => pre.scrollTo(30, 0)")
        await pre.evaluate(
            "pre => { const text = document.createTreeWalker(pre, NodeFilter.SHOW_TEXT).nextNode();"
            "getSelection().setBaseAndExtent(text, 0, text, text.data.length); }"
        )
        selected = await tab.page.evaluate("getSelection().toString()")
        copy = tab.page.locator("[data-copy]")
        # The button says for a short time only that it has copied, so the page itself keeps what the button said.
        await copy.evaluate(
            "copy => { window.said = [];"
            "new MutationObserver(() => window.said.push(copy.textContent)).observe(copy, { childList: true }); }"
        )
        await copy.click()
        await tab.until(copy, "() => window.said.includes('Copied')")
        assert "line 5" in await tab.page.evaluate("navigator.clipboard.readText()")
        lines = await pre.evaluate("pre => pre.textContent.split('\\n').length")
        await tab.until(pre, f"pre => pre.textContent.split('\\n').length > {lines + 2}")
        await tab.expect_state("streaming")
        assert await tab.page.evaluate("getSelection().toString()") == selected != ""
        assert await pre.evaluate("pre => pre.scrollLeft") == 30
        await tab.find("stop").click()


async def test_the_rate_is_shown_while_an_answer_is_written(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        tab = await server.open()
        server.engine.script = saying("word " * 200, pause=0.01, until=asyncio.Event())
        await tab.ask("Talk")
        await expect(tab.find("footnotes")).to_have_text(re.compile(r"\d+ tokens · \d+ tokens/s"))
        await tab.expect_state("streaming")


async def resting(thread: Locator) -> float:
    """Waits until the browser's scrolling has ended. Returns the place."""
    places: list[float] = []
    while len(places) < 4 or len(set(places[-4:])) > 1:
        places.append(
            await thread.evaluate("thread => new Promise(requestAnimationFrame).then(() => thread.scrollTop)")
        )
        await asyncio.sleep(0.1)
    return places[-1]


async def test_following_the_end_lets_go_at_the_slightest_scroll(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        tab = await server.open()
        server.engine.script = saying("\n\n".join(f"Paragraph {i}" for i in range(2000)), pause=0.005)
        await tab.ask("Talk")
        thread, to_end = tab.page.locator(".thread"), tab.page.get_by_label("Go to the latest message")
        await expect(tab.answers.last).to_contain_text("Paragraph 30")
        at_end = "thread => thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60"
        await tab.until(thread, at_end)  # the view follows the end of the answer
        await thread.hover()
        await tab.page.mouse.wheel(0, -3)
        await expect(to_end).to_be_visible()
        top, height = await resting(thread), await thread.evaluate("thread => thread.scrollHeight")
        await tab.until(thread, f"thread => thread.scrollHeight > {height + 300}")
        await tab.expect_state("streaming")
        assert await thread.evaluate("thread => thread.scrollTop") == top
        await to_end.click()
        await tab.until(thread, at_end)
        await tab.find("stop").click()


async def test_mathematics_is_typeset_under_the_pages_own_policy(async_browser: Browser) -> None:
    async with chat_server(async_browser) as server:
        tab = await server.open()
        server.engine.script = saying(
            r"So \(x^2\) is 2*3*4, and" + "\n\n" + r"\[ \int_0^1 \sqrt{x}\,dx = \frac{2}{3} \]"
        )
        await tab.ask("Sum")
        await tab.expect_state("complete")
        await expect(tab.page.locator(".katex-display .katex-html")).to_be_visible()
        await expect(tab.answers.last).to_contain_text("2*3*4")
        await expect(tab.page.locator(".answer em")).to_have_count(0)
        loaded = "() => [...document.fonts].some(font => /KaTeX_Main/.test(font.family) && font.status === 'loaded')"
        await tab.until(tab.page.locator("body"), loaded)
        height = await tab.page.locator(".katex-display .katex-html").evaluate("math => math.clientHeight")
        assert height > 20  # the styles that KaTeX sets have an effect


async def test_everything_can_be_taken_to_another_browser(async_browser: Browser, tmp_path: Path) -> None:
    async with chat_server(async_browser) as server:
        tab = await server.open()
        for text in ("First.", "Second."):
            server.engine.script = saying(text)
            await (tab.ask("Hi") if text == "First." else tab.find("regenerate").click())
            await expect(tab.answers.last).to_contain_text(text)
            await tab.expect_state("complete")
        await tab.find("settings-toggle").click()
        async with tab.page.expect_download() as download:
            await tab.find("export-all").click()
        file = tmp_path / "export.json"
        await (await download.value).save_as(file)
        other = await server.open()
        await other.find("settings-toggle").click()
        for _ in range(2):  # a second import changes nothing
            await other.find("import").set_input_files(file)
            await expect(other.page.get_by_role("status").filter(has_text="Imported 1 conversation.")).to_be_visible()
        await other.page.keyboard.press("Escape")
        await other.find("conversation-item").click()
        await expect(other.answers.last).to_contain_text("Second.")
        await other.page.get_by_label("Earlier version").click()
        await expect(other.answers.last).to_contain_text("First.")
        assert re.search(r'"api_?key"', file.read_text(), re.IGNORECASE) is None
