"""A browser context whose page asks for the most likely answers, for tests that await a certain answer of a model."""

from typing import Any

from playwright.sync_api import Browser, BrowserContext

# The page samples its answers by default. Even a model that is sure of an answer sometimes draws another one.
_CHOOSE_GREEDILY = """
if (localStorage.getItem("nanochat.settings") === null)
  localStorage.setItem("nanochat.settings", JSON.stringify({ temperature: 0 }));
"""


def greedy_context(browser: Browser, **options: Any) -> BrowserContext:
    """A new context with ``options``, in which the page's setting for the temperature is 0 at first."""
    context = browser.new_context(**options)
    context.add_init_script(_CHOOSE_GREEDILY)
    return context
