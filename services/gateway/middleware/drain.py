"""Ending without cutting anybody off: running answers get time to finish."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Drain:
    """Counts running answers and lets them out when the gateway ends.

    Attributes:
        draining: whether the end has begun; no new answer should be.
        expired: set when the time for running answers is over.
    """

    def __init__(self) -> None:
        self.draining = False
        self.expired = asyncio.Event()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count the block as a running answer."""
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def finish(self, seconds: float) -> int:
        """Begin the end, and wait up to ``seconds`` for the running answers.

        Returns:
            how many were still running then; these are told through :attr:`expired`.
        """
        self.draining = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        left = self._running
        self.expired.set()
        return left
