"""Several asynchronous streams read as one."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

T = TypeVar("T")

# A source may run this many items ahead of the reader, so that a slow reader slows the sources down.
_AHEAD = 16


class _End:
    pass


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yields the items of all sources as they arrive; the items of one source keep their order.

    The first error of a source closes the other sources and is raised. Closing the merged stream closes the sources.
    """
    queue: asyncio.Queue[T | Exception | _End] = asyncio.Queue(_AHEAD)

    async def pump(source: AsyncGenerator[T, None]) -> None:
        async with contextlib.aclosing(source):
            try:
                async for item in source:
                    await queue.put(item)
            except Exception as error:
                await queue.put(error)
            else:
                await queue.put(_End())

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        running = len(pumps)
        while running:
            got = await queue.get()
            if isinstance(got, Exception):
                raise got
            if isinstance(got, _End):
                running -= 1
            else:
                yield got
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
