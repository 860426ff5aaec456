"""Blocking work on daemon threads, which do not delay the end of the process.

Loading a model, or waiting for a store that does not answer, can take longer than a service may take to end.
asyncio.to_thread is no alternative: Python joins the threads of its executor before the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from nanochat_core.engine.async_engine import DEVICE_LOOP

T = TypeVar("T")

_NAME = "engine-work"


async def run_in_daemon_thread(function: Callable[..., T], *arguments: object) -> T:
    """Call ``function`` on a new daemon thread and wait for its result.

    Cancelling the wait does not stop the function.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def succeed(result: T) -> None:
        if not future.done():
            future.set_result(result)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may have ended meanwhile
            try:
                result = function(*arguments)
            except BaseException as error:
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(succeed, result)

    threading.Thread(target=work, name=_NAME, daemon=True).start()
    return await future


def any_working() -> bool:
    """Whether one of these threads, or a device loop, is still running."""
    return any(thread.name in (_NAME, DEVICE_LOOP) for thread in threading.enumerate())
