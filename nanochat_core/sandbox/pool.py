"""Starts workers before calls need them, so that a call does not wait for a worker to start."""

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable

from nanochat_core.sandbox.interface import WorkerFailed
from nanochat_core.sandbox.worker_process import WorkerProcess

log = logging.getLogger("nanochat.sandbox")

_RETRY_SECONDS = 1.0
# A call that finds no ready worker makes the pool larger by one, unless the pool's least size is 0. Each time that this
# many seconds pass without such a call, the pool becomes smaller by one.
_SHRINK_SECONDS = 5.0
_STARTS_AT_ONCE = 4
# Pause before the pool replaces a worker that a call has just taken, because the fork would delay this call. Usually,
# the call ends before the pause does, and the executor then refills the pool.
_PAUSE_SECONDS = 0.01


class WorkerPool:
    """Keeps between ``least`` and ``most`` workers ready, as many as the calls need. Each worker runs one call."""

    def __init__(self, start: Callable[[], Awaitable[WorkerProcess]], least: int, most: int) -> None:
        self._start = start
        self._least, self._most = least, max(least, most)
        self._size = least
        self._ready: collections.deque[WorkerProcess] = collections.deque()
        self._waiting: collections.deque[asyncio.Future[WorkerProcess]] = collections.deque()
        self._starting: set[asyncio.Task[None]] = set()
        self._shrinking: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._ready)

    async def take(self) -> WorkerProcess:
        """Return a fresh worker. The caller must dispose of it. Raises WorkerFailed if no worker can be started."""
        while self._ready:
            worker = self._ready.popleft()
            if worker.usable:
                asyncio.get_running_loop().call_later(_PAUSE_SECONDS, self.refill)
                return worker
            log.warning("an idle sandbox worker ended by itself or has lost its scratch folder")
            await worker.dispose()
        if self._least and self._size < self._most:
            self._size += 1
        self._shrink_later()
        waiter: asyncio.Future[WorkerProcess] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self.refill()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._hand_over(waiter.result())
            raise

    def refill(self) -> None:
        """Start workers in the background until the pool is full and no call waits."""
        while not self._closed and len(self._starting) < min(
            _STARTS_AT_ONCE, len(self._waiting) + self._size - len(self._ready)
        ):
            task = asyncio.create_task(self._start_one())
            self._starting.add(task)
            task.add_done_callback(self._started)

    async def close(self) -> None:
        """Stop refilling and end all ready workers."""
        self._closed = True
        if self._shrinking is not None:
            self._shrinking.cancel()
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        while self._ready:
            await self._ready.popleft().dispose()

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        self.refill()

    async def _start_one(self) -> None:
        try:
            worker = await self._start()
        except Exception as problem:
            error = problem if isinstance(problem, WorkerFailed) else WorkerFailed(f"no worker started: {problem!r}")
            while self._waiting:
                waiter = self._waiting.popleft()
                if not waiter.done():
                    waiter.set_exception(error)
                    return
            log.error("a sandbox worker could not be started", extra={"error": str(error)})
            await asyncio.sleep(_RETRY_SECONDS)
            return
        self._hand_over(worker)

    def _hand_over(self, worker: WorkerProcess) -> None:
        """Give a worker to the call that has waited longest. If no call waits, keep the worker ready."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(worker)
                return
        self._ready.append(worker)

    def _shrink_later(self) -> None:
        if self._shrinking is not None:
            self._shrinking.cancel()
        self._shrinking = asyncio.get_running_loop().call_later(_SHRINK_SECONDS, self._shrink)

    def _shrink(self) -> None:
        self._shrinking = None
        if self._size > self._least:
            self._size -= 1
            self._shrink_later()
        if len(self._ready) > self._size:
            task = asyncio.create_task(self._ready.pop().dispose())
            self._starting.add(task)
            task.add_done_callback(self._started)
