"""Attack a gateway, as a process of its own. ``hostile_load`` starts it and measures what ordinary clients notice.

The first line of standard input is an :class:`Order` as JSON. The attacks run until standard input ends. Then the
process prints as JSON in which ways the attackers' requests ended, and how often. The process has the lowest priority,
because real attackers compute on machines of their own, but this process must leave the processors to the gateway.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

# An attacker waits this long for an answer.
PATIENCE_SECONDS = 10.0
POST = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
CHAT = '{"messages":[{"role":"user","content":"hello"}],"stream":true,"temperature":0,"max_tokens":16}'
REGULAR_EXPRESSIONS = [
    "(?:a?){4999}a{5000}",
    "(?:a?){1400}a{1400}",  # is accepted, but costs almost as much as is allowed
    ".*" * 4999,
    "(a|aa)+" * 300,
    "([a-z]{1,99}){99}",
    r"(\w|b)*a(\w|b){200}",  # each token makes new states
    "(" * 2000 + ")" * 2000,
    "(((a{100}){100}){100}){100}",
]
SCHEMAS: list[dict[str, Any]] = [
    *({"properties": {"a": {"type": "string", "pattern": pattern}}} for pattern in REGULAR_EXPRESSIONS[:3]),
    {"properties": {f"property_{i}": {"type": "string"} for i in range(1500)}},
    {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}}] * 40}}},
    {"allOf": [{"anyOf": [{"required": [f"a{i}{j}"]} for j in range(9)]} for i in range(9)]},
]
NONSENSE = [
    '{"messages":[{"role":"assistant","content":"","nanochat":{"tool_events":[%s{}]}}]}' % ("{}," * 299_000),
    '{"messages":[%s1]}' % ("1," * 449_000),
    "[" * 900_000,
    '{"a":' * 150_000,
]
ENDLESS = CHAT.replace(',"max_tokens":16', "")


@dataclasses.dataclass(frozen=True)
class Target:
    """The address of a gateway, and the header line with a client's key, empty if the gateway needs none."""

    host: str
    port: int
    key: str = ""

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Opens a connection for the time of the block."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def status(self, *data: bytes) -> str:
        """Sends the data, reads the whole answer and returns its status, or how the connection ended."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS), self.connected() as (reader, writer):
                with contextlib.suppress(ConnectionError):
                    for part in data:
                        writer.write(part)
                        await writer.drain()
                line = await reader.readline()
                await reader.read()
                return line.split()[1].decode() if line else "closed"
        except TimeoutError:
            return "no answer"
        except OSError:
            return "reset"

    def post(self, body: str) -> bytes:
        """A request for a chat, after whose answer the gateway closes the connection."""
        return f"{POST}{self.key}connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


@dataclasses.dataclass(frozen=True)
class Order:
    """What to attack, and with which attacks.

    ``first`` is the number of the first attack. It differs from all numbers of earlier orders, so that the constraints
    are new.
    """

    host: str
    port: int
    key: str
    attacks: list[str]
    first: int


# Attacks once and returns how the attack ended. The number differs in each call.
Attack = Callable[[Target, int], Awaitable[str]]


async def one_header(target: Target, _number: int) -> str:
    """51 MB of one header."""
    return await target.status(b"GET /healthz HTTP/1.1\r\nx: ", *[b"a" * 2**20] * 51)


def posting(*bodies: str) -> Attack:
    """Returns an attack that posts the bodies in turn, each in a connection of its own."""

    async def attack(target: Target, number: int) -> str:
        return await target.status(target.post(bodies[number % len(bodies)]))

    return attack


async def constraint(target: Target, number: int) -> str:
    """A constraint that no request had before, so that no cache has it."""
    turn = number % (len(REGULAR_EXPRESSIONS) + len(SCHEMAS))
    request = json.loads(CHAT)
    if turn < len(REGULAR_EXPRESSIONS):
        request["regex"] = f"{REGULAR_EXPRESSIONS[turn]}{number}"
    else:
        schema = SCHEMAS[turn - len(REGULAR_EXPRESSIONS)] | {"title": str(number)}
        request["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return await target.status(target.post(json.dumps(request)))


def holding(beginning: str) -> Attack:
    """Returns an attack that sends the beginning and waits until the gateway closes the connection."""

    async def attack(target: Target, _number: int) -> str:
        try:
            async with target.connected() as (reader, writer):
                writer.write(beginning.encode())
                line = await reader.readline()
                await reader.read()
        except OSError:
            return "reset"
        return line.split()[1].decode() if line else "closed"

    return attack


async def slow_reader(target: Target, _number: int) -> str:
    """Asks for an endless answer and reads 1 KB of it each second."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        try:
            await loop.sock_connect(client, (target.host, target.port))
            await loop.sock_sendall(client, target.post(ENDLESS))
            while await loop.sock_recv(client, 1024):
                await asyncio.sleep(1)
        except OSError:
            return "cut off"
    return "closed"


# Each entry has the name of an attack, the attack, and the number of attackers at the same time.
ATTACKS: list[tuple[str, Attack, int]] = [
    ("51 MB of one header", one_header, 10),
    ("10 MB of body", posting("x" * 10_000_000), 10),
    ("900 KB of nested nonsense", posting(*NONSENSE), 10),
    ("new constraints", constraint, 10),
    ("1,000 idle connections", holding(""), 1000),
    ("200 half requests", holding(POST + "content-length: 100\r\n\r\n{"), 200),
    ("30 slow readers", slow_reader, 30),
]


def allow_connections() -> None:
    """Raises the limit of open files, so that one process can hold all attackers' connections."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard >= 0 else 8192, hard))


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels the tasks, waits for their end and raises what went wrong in one of them."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


async def main() -> None:
    """Reads the order, attacks and prints how the attacks ended."""
    os.nice(19)
    allow_connections()
    order = Order(**json.loads(sys.stdin.readline()))
    target = Target(order.host, order.port, order.key)
    numbers = iter(range(order.first, sys.maxsize))
    ended: Counter[str] = Counter()

    async def again(attack: Attack) -> None:
        while True:
            ended[await attack(target, next(numbers))] += 1

    chosen = [(attack, count) for name, attack, count in ATTACKS if name in order.attacks]
    tasks = [asyncio.create_task(again(attack)) for attack, count in chosen for _ in range(count)]
    await asyncio.to_thread(sys.stdin.read)
    await end(tasks)
    print(json.dumps(ended))


if __name__ == "__main__":
    asyncio.run(main())
