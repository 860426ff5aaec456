"""What arrives on the wire is bounded: in size, in time and in number, with an error in the API's form."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from services.gateway.server import listen
from tests.support.scripted_engine import (
    ScriptedEngine,
    chunk,
    http_client,
    ids,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = b'{"messages":[{"role":"user","content":"hello"}]}'
GET = b"GET /healthz HTTP/1.1\r\nhost: a\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
ARRIVAL, STALL = 0.5, 3.0  # seconds
# How long the gateway waits in the tests of other limits. On a busy machine, a client may send late.
PATIENCE = 60


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    async with (
        running_engine() as engine,
        running_gateway(engine.address, arrival_seconds=PATIENCE, max_connections=50, cors_origins=("*",)) as url,
    ):
        await until_ready(url)
        yield engine, url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def impatient(served: tuple[ScriptedEngine, str]) -> AsyncIterator[str]:
    """The address of a gateway that waits only a short time for a request, and for a client to read its answer."""
    changes = {"arrival_seconds": ARRIVAL, "stall_seconds": STALL}
    async with running_gateway(served[0].address, **changes) as url:
        await until_ready(url)
        served[0].forget()
        yield url


@pytest.fixture
def url(served: tuple[ScriptedEngine, str]) -> str:
    served[0].forget()
    served[0].script = saying("hello")
    return served[1]


@contextlib.asynccontextmanager
async def connection(
    url: str, first: bytes = b"", *, receive_bytes: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection. ``receive_bytes`` is the size of the kernel's receive buffer; None lets the kernel enlarge it.

    The bytes ``first`` are sent before the gateway, which runs in the same thread, can accept the connection. They
    therefore arrive in time, however busy the machine is.
    """
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.connect((host, int(port)))
    client.sendall(first)
    reader, writer = await asyncio.open_connection(sock=client)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """Reads one response: its status, its headers and its JSON."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).decode()
    status, *lines = head.strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, json.loads(await reader.readexactly(int(headers["content-length"])))


async def sent(url: str, *data: bytes) -> tuple[int, dict[str, str], Any]:
    async with connection(url) as (reader, writer):
        for part in data:
            writer.write(part)
            await writer.drain()
        return await answer(reader)


async def until_held(url: str, size: int) -> None:
    """Waits until the gateway holds this many bytes of bodies."""
    async with http_client(url) as http, asyncio.timeout(30):
        while f"nanochat_gateway_held_bytes {float(size)}\n" not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.05)


async def write_on(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"more")
        await writer.drain()
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
async def test_an_offer_of_http_2_is_ignored_and_the_body_is_read(url: str, chunked: bool, together: bool) -> None:
    length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % len(CHAT)
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(CHAT), CHAT) if chunked else CHAT
    head = POST + H2C + length + b"\r\n\r\n"
    async with connection(url) as (reader, writer):
        for _ in range(2):  # the connection can be used again
            writer.write(head + body if together else head)
            if not together:
                await asyncio.sleep(0.05)
                writer.write(body)
            status, _, value = await answer(reader)
            assert status == 200, value
            assert value["choices"][0]["message"]["content"] == "hello"


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"NONSENSE\r\n\r\n", 400, "invalid_http"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400, "invalid_http"),  # the header Host is missing
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_http"),  # a client that speaks TLS
        (GET + b"bad header\r\n\r\n", 400, "invalid_http"),
        (GET + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", 400, "invalid_http"),
        (POST + b"content-length: x\r\n\r\n", 400, "invalid_http"),
        (POST + b"transfer-encoding: chunked\r\n\r\nnot a length\r\n", 400, "invalid_http"),
        (POST + b"transfer-encoding: gzip\r\n\r\n", 501, "invalid_http"),
        (GET + b"x: " + b"a" * 20_000, 431, "headers_too_large"),
        (GET + b"x: " + b"a" * 20_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (GET + b"x:\r\n" * 50_000 + b"\r\n", 431, "headers_too_large"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 431, "headers_too_large"),
        (POST + b"content-length: 10000000\r\n\r\n", 413, "request_too_large"),
        (POST + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n\x1f\x8b", 415, "unsupported_content_encoding"),
    ],
)
async def test_a_request_that_cannot_be_read_gets_an_error_in_the_apis_form(
    url: str, request_: bytes, status: int, code: str
) -> None:
    # A page of another origin may read the error.
    origin = request_.replace(b"host: a\r\n", b"host: a\r\norigin: http://page\r\n", 1)
    got, headers, value = await sent(url, origin)
    assert (got, value["error"]["code"]) == (status, code), value
    assert set(value["error"]) == {"message", "type", "param", "code"}
    assert headers["access-control-allow-origin"] == "*"


async def test_a_header_without_end_is_read_no_further_than_the_limit(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.connection.LINGER_SECONDS", PATIENCE)
    status, _, value = await sent(url, GET + b"x: ", *[b"a" * 1_000_000] * 20)
    assert (status, value["error"]["code"]) == (431, "headers_too_large")
    assert "16384 bytes" in value["error"]["message"]


@pytest.mark.parametrize("close", [b"connection: close\r\n", b""])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_client_that_sends_all_of_a_too_large_body_sees_the_error(
    served: tuple[ScriptedEngine, str], monkeypatch: pytest.MonkeyPatch, close: bytes, chunked: bool
) -> None:
    monkeypatch.setattr("services.gateway.middleware.unread_body.LINGER_SECONDS", PATIENCE)
    body = b"x" * 5_000_000
    length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % len(body)
    framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    async with running_gateway(served[0].address) as url:
        await until_ready(url)
        status, headers, value = await sent(url, POST + close + length + b"\r\n\r\n", framed)
    assert (status, value["error"]["code"]) == (413, "request_too_large")
    assert headers["connection"] == "close"


async def test_bodies_that_fill_the_memory_leave_room_for_small_ones(served: tuple[ScriptedEngine, str]) -> None:
    big = b'{"messages":[{"role":"user","content":"hello"}],"user":"%s"}' % (b"x" * 90_000)
    head = POST + b"content-length: %d\r\n\r\n"
    changes = {"max_held_bytes": 200_000, "arrival_seconds": PATIENCE}
    async with running_gateway(served[0].address, **changes) as url, contextlib.AsyncExitStack() as stack:
        await until_ready(url)
        halves = []
        for _ in range(2):
            halves.append(await stack.enter_async_context(connection(url)))
            halves[-1][1].write(head % len(big) + big[:-1])
        await until_held(url, 2 * len(big) - 2)
        status, headers, value = await sent(url, head % len(big) + big)
        assert (status, value["error"]["code"]) == (503, "gateway_overloaded")
        assert "retry-after" in headers
        await until_held(url, 2 * len(big) - 2)
        assert (await sent(url, head % len(CHAT) + CHAT))[0] == 200
        for reader, writer in halves:
            writer.write(big[-1:])
            assert (await answer(reader))[0] == 200
        await until_held(url, 0)
        assert (await sent(url, head % len(big) + big))[0] == 200


async def test_a_client_that_goes_on_after_an_error_is_cut_off(url: str) -> None:
    async with connection(url) as (reader, writer):
        writer.write(b"NONSENSE\r\n\r\n")
        assert (await answer(reader))[0] == 400
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(write_on(writer), 30)


@pytest.mark.parametrize(
    ("beginning", "said"),
    [(b"", False), (b"GET /hea", True), (GET, True), (POST + b"content-length: 50\r\n\r\n{", True)],
)
async def test_a_request_must_arrive_in_time(impatient: str, beginning: bytes, said: bool) -> None:
    began = time.monotonic()
    async with connection(impatient, beginning) as (reader, _):
        if said:
            status, _, value = await answer(reader)
            assert (status, value["error"]["code"]) == (408, "request_timeout")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 30) == b""
    assert ARRIVAL * 0.9 < time.monotonic() - began < ARRIVAL + 15


async def test_a_byte_now_and_then_does_not_extend_the_time(impatient: str) -> None:
    async with connection(impatient, GET) as (reader, writer):
        read = asyncio.create_task(answer(reader))
        for byte in b"x: " + b"a" * 100:
            if read.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(ARRIVAL / 10)
        assert (await read)[0] == 408


async def test_a_long_answer_and_a_pause_between_requests_are_no_late_request(
    served: tuple[ScriptedEngine, str], impatient: str
) -> None:
    served[0].script = saying("hello", pause=ARRIVAL)
    request = POST + b"content-length: %d\r\n\r\n%s" % (len(CHAT), CHAT)
    async with connection(impatient, request) as (reader, writer):
        assert (await answer(reader))[0] == 200
        await asyncio.sleep(ARRIVAL * 1.5)
        writer.write(request)
        assert (await answer(reader))[0] == 200


async def test_what_the_gateway_writes_is_sent_without_waiting_for_acknowledgments() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_idle_connections_keep_nobody_out(url: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(120):
            await stack.enter_async_context(connection(url))
        async with http_client(url) as http:
            assert (await http.post("/v1/chat/completions", content=CHAT, headers=JSON)).status_code == 200


async def test_a_client_that_does_not_read_its_answer_soon_loses_it(
    served: tuple[ScriptedEngine, str], impatient: str
) -> None:
    tokens = 0

    async def endless(_request: Any, _context: Any) -> AsyncIterator[Any]:
        nonlocal tokens
        while True:
            tokens += 100
            yield chunk(ids("hello") * 100)

    engine = served[0]
    engine.forget()
    engine.script = endless
    body = b'{"messages":[{"role":"user","content":"hello"}],"stream":true}'
    request = POST + b"content-length: %d\r\n\r\n%s" % (len(body), body)
    async with connection(impatient, request, receive_bytes=4096) as (_, writer):
        writer.transport.pause_reading()
        await asyncio.wait_for(engine.cancelled.acquire(), 30)
    # The engine stops when the buffers of gRPC and the kernel are full, which took 4.2 MB of text on a fast processor.
    assert len("hello") * tokens < 6_000_000
    async with http_client(impatient) as http:
        assert 'connections_closed_total{reason="stalled"} 1.0' in (await http.get("/metrics")).text


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("path", ["/healthz", "/health", "/readyz", "/version", "/metrics", "/v1/models", "/docs"])
async def test_head_has_the_headers_of_get_and_no_body(url: str, path: str) -> None:
    async with http_client(url) as http:
        got, head = await http.get(path), await http.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/healthz", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/models/nano", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/tokenize", "POST"),
        ("BREW", "/v1/completions", "POST"),
    ],
)
async def test_a_wrong_method_names_the_right_ones(url: str, method: str, path: str, allow: str) -> None:
    async with http_client(url) as http:
        answer = await http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    if method != "HEAD":
        assert answer.json()["error"]["code"] == "method_not_allowed"


async def test_a_fault_of_the_gateway_has_the_apis_form_and_can_be_read_by_a_page(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("services.gateway.api.chat.conversation", fail)
    async with http_client(url) as http:
        answer = await http.post(
            "/v1/chat/completions", content=CHAT, headers={**JSON, "Origin": "http://page.example"}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
