"""Blocking work on daemon threads. Daemon threads do not delay the end of the process.

Loading a model, or waiting for a store or a name server that does not answer, can take longer than the time in which a
service must end. asyncio.to_thread is no alternative: Python joins the threads of its executor before the process ends.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

DAEMON_WORK = "daemon-work"
"""Name of the threads that :func:`run_in_daemon_thread` starts."""


async def run_in_daemon_thread(function: Callable[..., T], *arguments: object) -> T:
    """Call ``function`` on a new daemon thread and wait for its result or its exception.

    Canceling the wait does not stop the function.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # nobody can cancel the future any more, so the thread can set the result

    def work() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name=DAEMON_WORK, daemon=True).start()
    return await asyncio.wrap_future(future)
