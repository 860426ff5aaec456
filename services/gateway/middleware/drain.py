"""Graceful shutdown: running answers get time to finish before the gateway ends."""

import asyncio
import contextlib
from collections.abc import Iterator


class Drain:
    """Counts running answers, so that a shutdown can wait for them.

    Attributes:
        draining: True once the shutdown has begun; the gateway then starts no new answer.
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
        """Counts the block as a running answer."""
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def finish(self, seconds: float) -> int:
        """Begins the shutdown and waits up to ``seconds`` for the running answers.

        Returns:
            the number of answers that were still running at the end of the wait; :attr:`expired` tells them to stop.
        """
        self.draining = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        left = self._running
        self.expired.set()
        return left
