"""Fixtures of the tests that serve a scripted engine through a gateway. Each test file has its own ``served``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import openai

    from tests.support.scripted_engine import ScriptedEngine


@pytest.fixture
def url(served: tuple[ScriptedEngine, str]) -> str:
    return served[1]


@pytest.fixture
def client(url: str) -> openai.AsyncOpenAI:
    from tests.support.scripted_engine import openai_client  # other tests of this folder need not import the gateway

    return openai_client(url)
