"""Merges several asynchronous streams into one."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

T = TypeVar("T")

# The queue has room for this many items of all sources together, so a slow reader slows the sources down.
_AHEAD = 16


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yields the items of all sources as they arrive; the items of one source keep their order.

    If a source raises an error, the other sources are closed, and the merged stream raises the error. Closing the
    merged stream closes the sources.
    """
    queue: asyncio.Queue[T | Exception] = asyncio.Queue(_AHEAD)

    async def pump(source: AsyncGenerator[T, None]) -> None:
        async with contextlib.aclosing(source):
            try:
                while True:
                    await queue.put(await anext(source))
            except Exception as error:  # also catches the StopAsyncIteration that ends a source
                await queue.put(error)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(pumps)
        while running:
            got = await queue.get()
            if isinstance(got, StopAsyncIteration):
                running -= 1
            elif isinstance(got, Exception):
                raise got
            else:
                yield got
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
