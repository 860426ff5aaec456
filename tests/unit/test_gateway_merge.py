"""A merged stream keeps the order and the errors of its sources and closes all of them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from services.gateway.answer.merge import merge


async def count(name: str, up_to: int, closed: list[str]) -> AsyncGenerator[tuple[str, int], None]:
    try:
        for i in range(up_to):
            await asyncio.sleep(0)
            yield name, i
    finally:
        closed.append(name)


async def test_every_item_comes_once_and_in_its_sources_order() -> None:
    closed: list[str] = []
    got = [item async for item in merge([count("a", 50, closed), count("b", 3, closed), count("c", 0, closed)])]
    assert [i for name, i in got if name == "a"] == list(range(50))
    assert [i for name, i in got if name == "b"] == [0, 1, 2]
    assert sorted(closed) == ["a", "b", "c"]


async def test_an_error_ends_all_sources() -> None:
    closed: list[str] = []

    async def fail() -> AsyncGenerator[tuple[str, int], None]:
        yield "bad", 0
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([count("a", 10**9, closed), fail()]):
            pass
    assert closed == ["a"]


@pytest.mark.parametrize("names", ["a", "ab"])
async def test_a_reader_that_stops_early_closes_the_sources(names: str) -> None:
    closed: list[str] = []
    async with contextlib.aclosing(merge([count(name, 10**9, closed) for name in names])) as items:
        async for _ in items:
            break
    assert sorted(closed) == list(names)
