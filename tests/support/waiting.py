"""Waits for a condition instead of a time, so that a busy machine makes a test slower and not wrong."""

import asyncio
import time
from collections.abc import Callable


def eventually(condition: Callable[[], object], seconds: float = 60, every: float = 0.01) -> None:
    """Wait until the condition is true. Raises AssertionError if it is false for ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(every)


async def until(condition: Callable[[], object], seconds: float = 60, every: float = 0.01) -> None:
    """Wait until the condition is true. Raises TimeoutError if it is false for ``seconds``."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(every)
