"""Trained demo models and running services for the end-to-end tests."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio
from playwright import async_api, sync_api
from playwright.sync_api import Browser, sync_playwright

from tests.support.stack import ROOT, Stack

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# On a busy machine the page draws late. Playwright's own limit of 5 s would then fail tests of a page that is right.
EXPECT_MS = 30_000
sync_api.expect.set_options(timeout=EXPECT_MS)
async_api.expect.set_options(timeout=EXPECT_MS)

# Time limit of each test. It is long, because the first test waits for a training.
TRAINING_SECONDS = 1500


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(TRAINING_SECONDS))


@pytest.fixture(scope="session")
def demo_home() -> Path:
    """A store with a demo model that was trained for fewer steps than the recipe's model."""
    return _trained("tests.support.quick_demo", ROOT / "build/quick-demo")


@pytest.fixture(scope="session")
def recipe_home() -> Path:
    """A store with the demo model of the recipe: the checkout's own, or the one that NANOCHAT_TEST_HOME names."""
    return _trained("jobs.train.pipeline", Path(os.environ.get("NANOCHAT_TEST_HOME") or ROOT / ".nanochat"))


def _trained(program: str, home: Path) -> Path:
    """Train a demo model, unless the store has one.

    The training skips finished stages. If several test processes need a model, one of them trains it, and the others
    wait.
    """
    lock = os.open(Path(__file__).parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "-m", program, "--recipe", "demo", "--home", str(home)], cwd=ROOT, check=True)
    finally:
        os.close(lock)
    return home


# The services end with each module, because tests of other modules look for unexpected processes.
@pytest.fixture(scope="module")
def stack(demo_home: Path) -> Iterator[Stack]:
    running = Stack(demo_home)
    try:
        running.wait_ready()
        yield running
    finally:
        assert running.stop() == 0, "".join(running.log)


@pytest.fixture
def url(stack: Stack) -> str:
    return stack.wait_ready()


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


# The browser ends with each module: while a browser is open, no other test of this process can run an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=_chromium(), args=CHROMIUM_FLAGS)
        yield started
        started.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def async_browser() -> AsyncIterator[async_api.Browser]:
    """A browser for tests that run the gateway in their own event loop, in front of a scripted engine."""
    async with async_api.async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=_chromium(), args=CHROMIUM_FLAGS)
        yield started
        await started.close()


def _chromium() -> str:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine; tests/install-servers installs it")
    return chromium
