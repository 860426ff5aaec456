"""Large bodies are parsed one at a time, and the bodies of one caller do not delay those of another."""

import asyncio

from services.gateway.api.json_body import Parser

LARGE, SMALLER = b'{"x": [%s]}' % b",".join([b"{}"] * 100_000), b'"%s"' % (b"x" * 70_000)


async def test_callers_with_large_bodies_take_turns() -> None:
    parser = Parser()
    parsed: list[str] = []

    async def parse(body: bytes, caller: str) -> None:
        await parser.parse(body, caller)
        parsed.append(caller)

    await asyncio.gather(*(parse(LARGE, "many") for _ in range(5)), parse(SMALLER, "one"))
    assert parsed == ["many", "many", "one", "many", "many", "many"]


async def test_a_client_that_leaves_lets_the_next_body_be_parsed() -> None:
    parser = Parser()
    leaving = [asyncio.create_task(parser.parse(LARGE, "a")) for _ in range(2)]
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    assert await parser.parse(b"[1]", "b") == [1]
