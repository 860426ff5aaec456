"""Work on threads that the end of the process does not wait for.

Loading a model, or a store that does not answer, can take longer than the time in which a service must have ended.
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


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """What ``function`` gives, from a thread of its own; it goes on when nobody waits for it any more."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def succeed(result: T) -> None:
        if not future.done():
            future.set_result(result)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            try:
                result = function(*arguments)
            except BaseException as error:
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(succeed, result)

    threading.Thread(target=work, name=_NAME, daemon=True).start()
    return await future


def any_working() -> bool:
    """Whether such a thread, or a device loop, has not ended yet."""
    return any(thread.name in (_NAME, DEVICE_LOOP) for thread in threading.enumerate())
