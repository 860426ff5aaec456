"""Starts workers before calls need them, so that a call does not wait for a worker to start."""

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable

from nanochat_core.sandbox.interface import WorkerFailed
from nanochat_core.sandbox.worker_process import WorkerProcess

log = logging.getLogger("nanochat.sandbox")

_RETRY_SECONDS = 1.0
# Starting a process blocks the executor's thread for a moment. Because of this pause before each start, a call that has
# just taken a worker begins before the next worker starts.
_PAUSE_SECONDS = 0.005


class WorkerPool:
    """Keeps ``size`` workers ready. Each worker runs one call. A background task starts new workers one by one."""

    def __init__(self, start: Callable[[], Awaitable[WorkerProcess]], size: int) -> None:
        self._start = start
        self._size = size
        self._ready: collections.deque[WorkerProcess] = collections.deque()
        self._refilling: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._ready)

    async def take(self) -> WorkerProcess:
        """Return a fresh worker. The caller must dispose of it."""
        while self._ready:
            worker = self._ready.popleft()
            self.refill()
            if worker.alive:
                return worker
            log.warning("an idle sandbox worker ended by itself")
            await worker.dispose()
        self.refill()
        return await self._start()

    def refill(self) -> None:
        """Start workers in the background until the pool is full."""
        if self._refilling is None or self._refilling.done():
            self._refilling = asyncio.create_task(self._fill())

    async def close(self) -> None:
        """Stop refilling and end all ready workers."""
        if self._refilling is not None:
            self._refilling.cancel()
            await asyncio.gather(self._refilling, return_exceptions=True)
        while self._ready:
            await self._ready.popleft().dispose()

    async def _fill(self) -> None:
        while len(self._ready) < self._size:
            if self._ready:
                await asyncio.sleep(_PAUSE_SECONDS)
            try:
                self._ready.append(await self._start())
            except WorkerFailed as error:
                log.error("a sandbox worker could not be started", extra={"error": str(error)})
                await asyncio.sleep(_RETRY_SECONDS)
