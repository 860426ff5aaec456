"""Services that die while they are in use."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from playwright.sync_api import Browser, expect

from tests.support.greedy_page import greedy_context
from tests.support.stack import Stack

SUM = [{"role": "user", "content": "What is 1234 * 5678?"}]


@pytest.fixture(scope="module")
def stack(demo_home: Path) -> Iterator[Stack]:
    """Services that the tests may kill or stop. Each test but the last leaves them ready."""
    # On a busy machine, an engine may need longer for its start than a request waits by default.
    running = Stack(demo_home, NANOCHAT_GATEWAY_QUEUE_SECONDS="200")
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


def test_an_answer_goes_on_after_its_only_engine_was_killed_and_started_again(stack: Stack, demo_home: Path) -> None:
    url = stack.wait_ready()
    special = json.loads((demo_home / "tokenizers/demo/tokenizer.json").read_text())["special_tokens"]
    # This answer cannot end by itself, so it is still running when the engine dies.
    bias = {str(i): -100 for i in special.values()}
    request = {"model": "demo", "prompt": "The town", "stream": True, "seed": 7, "logit_bias": bias}

    def ask(killed: int | None) -> tuple[str, list[str]]:
        """Returns the answer's text and its other events. Kills the process ``killed`` after the first event."""
        text, events = "", list[str]()
        with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=120) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    text += choice["text"]
                    events += [choice["finish_reason"]] if choice["finish_reason"] else []
                elif line and not line.startswith(":"):
                    events.append(line)
                if killed is not None and text:
                    os.kill(killed, signal.SIGKILL)
                    killed = None
        return text, events

    disturbed = ask(stack.service_pid("engine"))
    assert disturbed[1] == ["length", "data: [DONE]"]
    assert disturbed == ask(None)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="demo", messages=SUM, temperature=0)
    assert "7006652" in (answer.choices[0].message.content or "")


def test_the_page_says_that_the_engine_is_gone_and_recovers(stack: Stack, browser: Browser) -> None:
    url = stack.wait_ready()
    page = greedy_context(browser).new_page()
    page.goto(url)
    engine = stack.service_pid("engine")
    # A stopped engine accepts the question but never answers. After the kill, ``make run`` starts it again.
    os.kill(engine, signal.SIGSTOP)
    page.get_by_test_id("composer").fill("What is 1234 * 5678?")
    page.get_by_test_id("composer").press("Enter")
    expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "streaming")
    os.kill(engine, signal.SIGKILL)
    expect(page.get_by_test_id("banner")).to_have_attribute("data-state", "loading")
    # The engine starts again meanwhile.
    expect(page.get_by_test_id("message-assistant").last).to_contain_text("7006652", timeout=180_000)


def test_without_the_sandbox_the_model_reads_a_tool_error(stack: Stack) -> None:
    url = stack.wait_ready()
    sandbox = stack.service_pid("sandbox")
    # A killed sandbox would be restarted before the call gives up, and the call would succeed.
    os.kill(sandbox, signal.SIGSTOP)
    try:
        answer = httpx.post(
            f"{url}/v1/chat/completions", json={"model": "demo", "messages": SUM, "temperature": 0}, timeout=120
        )
    finally:
        os.kill(sandbox, signal.SIGCONT)
    assert answer.status_code == 200
    _, result = answer.json()["choices"][0]["message"]["nanochat"]["tool_events"]
    assert result["status"] != "ok"
    assert result["output"].startswith("error")


def test_a_second_start_is_ready_in_seconds(demo_home: Path) -> None:
    started = time.monotonic()
    running = Stack(demo_home)
    try:
        running.wait_ready()
        assert time.monotonic() - started < 60
    finally:
        running.stop()


def test_a_taken_port_is_a_clear_error(demo_home: Path, stack: Stack) -> None:
    port = stack.wait_ready().rsplit(":", 1)[1]
    second = Stack(demo_home, PORT=port)
    with pytest.raises(AssertionError, match=f"{port}"):
        second.wait_ready()
    assert second.stop() != 0


def test_ctrl_c_stops_every_service(stack: Stack) -> None:
    stack.wait_ready()
    pids = [stack.service_pid(name) for name in ("sandbox", "engine", "gateway")]
    assert stack.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
