"""The demo model is trained under Docker Compose while the services run, and one can watch and chat meanwhile.

This takes a training of the demo model, so it runs only with NANOCHAT_TEST_FULL=1 (make test-cluster-full).
"""

import concurrent.futures
import contextlib
import time
import urllib.error
from collections.abc import Iterator

import pytest
from test_compose import Stack, get_json

from deploy.local import free_port
from tests.support.commands import ONLY_FULL, QUESTION, assert_answer_came_through_the_tool
from tests.support.watched_run import WatchedRun

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(2400),
    ONLY_FULL,
]

TRAINING_SECONDS = 1800


@pytest.fixture
def stack() -> Iterator[Stack]:
    """Services with an empty store. They are not healthy yet, because there is no model."""
    stack = Stack(free_port(), free_port(), "store")
    try:
        stack.compose("up", "--detach")
        yield stack
    finally:
        stack.compose("--profile", "train", "down", "--volumes", "--remove-orphans")


def chat(stack: Stack) -> str:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}
    text: str = get_json(stack.url("/v1/chat/completions"), body)["choices"][0]["message"]["content"]
    return text


def test_one_watches_the_training_and_talks_with_a_snapshot_and_then_with_the_promoted_model(stack: Stack) -> None:
    watched, deadline, talked = WatchedRun(), time.monotonic() + TRAINING_SECONDS, ""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        trained = pool.submit(stack.compose, "run", "--rm", "train", timeout=TRAINING_SECONDS)
        while not watched.done:
            assert time.monotonic() < deadline, "the engine never served the promoted model"
            assert not (trained.done() and trained.exception()), trained.exception()
            # At first, there is neither a gateway nor any progress.
            with contextlib.suppress(*(() if watched.snapshot else (urllib.error.URLError, ConnectionError))):
                watched.see(get_json(stack.url("/progress")))
            if watched.snapshot and not talked:
                talked = chat(stack)
            time.sleep(1)
        trained.result()
    watched.check()
    assert talked
    body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    assert_answer_came_through_the_tool(get_json(stack.url("/v1/chat/completions"), body)["choices"][0]["message"])
