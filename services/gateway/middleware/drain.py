"""Runs the tasks that write answers, and lets running answers finish before the gateway ends."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from services.gateway.errors import ClientGone, shutting_down
from services.gateway.middleware.request_log import RequestRecord

T = TypeVar("T")


class Drain:
    """Keeps track of running answers, so that a shutdown can wait for them. While ``draining``, no answer starts."""

    def __init__(self) -> None:
        self.draining = False
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, work: Coroutine[Any, Any, T], receive: Receive, record: RequestRecord) -> T:
        """Runs ``work`` and returns its result. Cancels ``work`` if the client leaves; :meth:`finish` can cancel it.

        Args:
            receive: the request's ASGI ``receive``; the body must have been read already.

        Raises:
            ClientGone: the client left first.
            ApiError: 503 if the gateway is shutting down.
        """
        if self.draining:
            work.close()
            raise shutting_down()
        task = asyncio.create_task(work)
        gone = asyncio.create_task(_disconnected(receive))
        self._running.add(task)
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                record.status = 499
                raise ClientGone
            if task.cancelled():
                raise shutting_down()
            return task.result()
        finally:
            await cancel(task, gone)
            self._running.remove(task)

    async def finish(self, seconds: float) -> int:
        """Begins the shutdown and waits up to ``seconds`` for running answers.

        Then cancels the unfinished answers and returns their number.
        """
        self.draining = True
        if not self._running:
            return 0
        _, late = await asyncio.wait(self._running, timeout=seconds)
        for task in late:
            task.cancel()
        return len(late)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancels the tasks and waits for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
