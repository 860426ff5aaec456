"""Waits for descriptors in an event loop."""

import asyncio
from collections.abc import Callable


async def wait_for_fd(add: Callable[..., object], remove: Callable[[int], object], *fds: int) -> None:
    """Wait until one of ``fds`` can be read or written.

    ``add`` and ``remove`` are the event loop's ``add_reader`` and ``remove_reader``, or ``add_writer`` and
    ``remove_writer``.
    """
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    for fd in fds:
        add(fd, set_ready)
    try:
        await ready
    finally:
        for fd in fds:
            remove(fd)
