"""Waits for descriptors in an event loop."""

import asyncio
from collections.abc import Callable


async def wait_for_fd(add: Callable[..., object], remove: Callable[[int], object], fd: int) -> None:
    """Wait until ``fd`` can be read or written; ``add`` is the event loop's ``add_reader`` or ``add_writer``."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, set_ready)
    try:
        await ready
    finally:
        remove(fd)
