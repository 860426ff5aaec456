"""The gateway for operators and browsers: pages, API documentation, metrics, logs and shutdown."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from nanochat_core.protos import engine_pb2 as pb
from services.gateway.app import create_app
from services.gateway.server import Server, listen
from services.gateway.settings import GatewaySettings
from tests.support.scripted_engine import (
    TOKENIZER,
    chunk,
    failing,
    hanging,
    http_client,
    ids,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
ROOT = Path(__file__).parents[2]


def metric(page: str, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == f"nanochat_gateway_{name}" and labels.items() <= sample.labels.items():
                return sample.value
    raise AssertionError(f"no {name} {labels}")


async def test_metrics_count_what_happened() -> None:
    async with (
        running_engine() as engine,
        running_gateway(engine.address) as url,
        http_client(url) as http,
    ):
        await until_ready(url)
        engine.script = saying("hello world", pause=0.01)
        await http.post("/v1/chat/completions", json={"messages": HELLO})
        await http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True, "stop": " "})
        await http.post("/v1/chat/completions", json={"messages": []})
        await http.get("/v1/models/anything/at/all")
        await http.get("/no/such/path")
        page = (await http.get("/metrics")).text
    route = "/v1/chat/completions"
    assert metric(page, "requests_total", route=route, status="200") == 2
    assert metric(page, "requests_total", route=route, status="400") == 1
    assert metric(page, "requests_total", route="/v1/models/{model:path}", status="404") == 1
    assert "no/such/path" not in page
    assert metric(page, "request_duration_seconds_count", route=route) == 3
    assert metric(page, "requests_in_flight") == 0
    assert metric(page, "time_to_first_token_seconds_count") == 2
    assert metric(page, "inter_token_latency_seconds_sum") > 0.01
    assert metric(page, "prompt_tokens_total") == 10
    assert metric(page, "generation_tokens_total") >= 5
    assert metric(page, "choices_finished_total", finish_reason="stop") == 2
    assert metric(page, "engine_up", address=engine.address) == 1


async def test_each_request_is_one_log_event_without_content(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with (
        running_engine() as engine,
        running_gateway(engine.address) as url,
        http_client(url) as http,
    ):
        await until_ready(url)
        engine.script = saying("the secret answer")
        caplog.clear()
        for stream in (False, True):
            body = {"messages": [{"role": "user", "content": "my secret"}], "stream": stream}
            await http.post("/v1/chat/completions?key=secret", json=body, headers={"x-request-id": f"id-{stream}"})
        engine.script = failing(grpc.StatusCode.INTERNAL, "it broke", after=engine.script)
        await http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
        await http.post("/v1/chat/completions", json={"messages": HELLO, "model": "other"})
        await http.get("/healthz")
    logged = [record for record in caplog.records if record.getMessage() == "request"]
    posted = [vars(record) for record in logged if vars(record)["method"] == "POST"]
    assert [event["request_id"] for event in posted[:2]] == ["id-False", "id-True"]
    assert [(event["status"], event.get("error")) for event in posted] == [
        (200, None),
        (200, None),
        (200, "engine_error"),
        (404, "model_not_found"),
    ]
    assert posted[0]["path"] == "/v1/chat/completions"
    assert posted[0]["model"] == "nano"
    assert posted[0]["prompt_tokens"] == 4 + len(TOKENIZER.encode("my secret"))
    assert posted[0]["completion_tokens"] == posted[1]["completion_tokens"] == len(ids("the secret answer")) + 1
    assert all(event["duration_seconds"] > 0 for event in posted)
    assert [record.levelno for record in logged if vars(record)["path"] == "/healthz"] == [logging.DEBUG]
    assert "secret" not in " ".join(json.dumps(vars(record), default=str) for record in logged)


async def test_a_client_that_left_is_logged_as_such(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_engine() as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        engine.script = hanging("hello")
        async with http_client(url) as http:
            for count, stream in enumerate((True, False), start=1):
                body = {"messages": HELLO, "stream": stream}
                asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
                while len(engine.requests) < count:
                    await asyncio.sleep(0.01)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                await asyncio.wait_for(engine.cancelled.acquire(), 30)
    logged = [vars(record) for record in caplog.records if record.getMessage() == "request"]
    assert [event["status"] for event in logged if event["method"] == "POST"] == [499, 499]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_the_page_is_served_with_its_headers(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<!doctype html><title>chat</title>")
    (tmp_path / "assets" / "index-3f2a.js").write_text("let a")
    (tmp_path / "favicon.svg").write_text("<svg/>")
    (tmp_path.parent / "outside.txt").write_text("no")
    async with running_gateway("127.0.0.1:1", static=tmp_path) as url, http_client(url) as http:
        page = await http.get("/")
        assert (page.status_code, "chat" in page.text) == (200, True)
        assert page.headers["cache-control"] == "no-cache"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["referrer-policy"] == "no-referrer"
        script = await http.get("/assets/index-3f2a.js")
        assert "immutable" in script.headers["cache-control"]
        assert "javascript" in script.headers["content-type"]
        assert (await http.get("/favicon.svg")).headers["cache-control"] == "no-cache"
        again = await http.get("/", headers={"If-None-Match": page.headers["etag"]})
        assert again.status_code == 304
        for path in ("/missing.js", "/..%2foutside.txt", "/%2e%2e/outside.txt"):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(
    ("accepted", "coding", "content"),
    [
        ("gzip, deflate, br, zstd", "br", b"brotli"),
        ("gzip", "gzip", b"gzipped"),
        ("br;q=0, gzip;q=0.5", "gzip", b"gzipped"),
        ("identity", None, b"plain"),
        ("*;q=0.1", None, b"plain"),
    ],
)
async def test_compressed_files_are_sent_to_who_accepts_them(
    tmp_path: Path, accepted: str, coding: str | None, content: bytes
) -> None:
    (tmp_path / "assets").mkdir()
    for ending, text in (("", "plain"), (".br", "brotli"), (".gz", "gzipped")):
        (tmp_path / "assets" / f"index-3f2a.js{ending}").write_text(text)
    async with running_gateway("127.0.0.1:1", static=tmp_path) as url, http_client(url) as http:
        headers = {"Accept-Encoding": accepted}
        async with http.stream("GET", "/assets/index-3f2a.js", headers=headers) as answer:
            assert b"".join([part async for part in answer.aiter_raw()]) == content
        assert answer.headers.get("content-encoding") == coding
        assert answer.headers["vary"] == "Accept-Encoding"
        assert "javascript" in answer.headers["content-type"]
        assert "immutable" in answer.headers["cache-control"]
        again = await http.get("/assets/index-3f2a.js", headers=headers | {"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304


async def test_a_page_that_is_not_built_says_how_to_build_it() -> None:
    async with running_gateway("127.0.0.1:1") as url, http_client(url) as http:
        page = await http.get("/")
        assert page.status_code == 404
        assert page.headers["content-type"].startswith("text/html")
        assert "npm run build" in page.text


async def test_the_documentation_needs_nothing_from_elsewhere() -> None:
    async with running_gateway("127.0.0.1:1") as url, http_client(url) as http:
        page = await http.get("/docs")
        assert page.status_code == 200
        assert "/v1/chat/completions" in page.text
        assert "temperature" in page.text
        assert "http://" not in page.text
        assert "https://" not in page.text
        assert "<style" not in page.text
        assert "<script" not in page.text
        assert (await http.get("/docs/style.css")).headers["content-type"].startswith("text/css")
        spec = (await http.get("/openapi.json")).json()
    chat = spec["paths"]["/v1/chat/completions"]["post"]
    assert "422" not in chat["responses"]
    assert chat["responses"]["200"]["content"]["application/json"]["example"]["choices"]
    assert spec["components"]["schemas"]["ChatRequest"]["example"]["messages"]


async def test_other_origins_are_let_in_only_when_named() -> None:
    ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    async with running_gateway("127.0.0.1:1") as url, http_client(url) as http:
        assert "access-control-allow-origin" not in (await http.get("/healthz", headers=ask)).headers
    async with (
        running_gateway("127.0.0.1:1", cors_origins=("https://app.example",)) as url,
        http_client(url) as http,
    ):
        answer = await http.options("/v1/chat/completions", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = await http.get("/healthz", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


class Process:
    """The gateway as a subprocess, and the events that it logs."""

    def __init__(self, process: asyncio.subprocess.Process, events: asyncio.Queue[dict[str, Any]]) -> None:
        self.process = process
        self._events = events

    async def event(self, name: str) -> dict[str, Any]:
        """Waits for the next log event with that name."""
        async with asyncio.timeout(60):
            while (event := await self._events.get())["event"] != name:
                pass
        return event


@contextlib.asynccontextmanager
async def program(*flags: str, **environment: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway", *flags),
        cwd=ROOT,
        env=os.environ | environment,
        stderr=asyncio.subprocess.PIPE,
    )
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def read() -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            # A line that isn't JSON fails the test here.
            events.put_nowait(json.loads(line))

    reading = asyncio.create_task(read())
    try:
        yield Process(process, events)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await reading


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_running_answers_finish_after_the_signal_and_the_program_ends_with_zero(number: Any) -> None:
    go_on = asyncio.Event()

    async def script(request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
        yield chunk(ids("hello"))
        await go_on.wait()
        yield chunk(ids("!"), finish=pb.FINISH_REASON_STOP)

    async with running_engine() as engine, program("--port", "0", "--engine-addresses", engine.address) as gateway:
        ready = await gateway.event("ready")
        url = f"http://{ready['address']}"
        assert ready["metrics_address"] == ready["address"]
        await until_ready(url)
        engine.script = script
        async with (
            http_client(url) as other,
            http_client(url) as http,
            http.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}) as answer,
        ):
            lines = answer.aiter_lines()
            while "hello" not in await anext(lines):
                pass
            gateway.process.send_signal(number)
            await gateway.event("draining")
            assert (await other.get("/readyz")).status_code == 503
            assert (await other.get("/healthz")).status_code == 200
            late = await other.post("/v1/chat/completions", json={"messages": HELLO})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
            assert late.headers["retry-after"]
            go_on.set()
            rest = [line async for line in lines]
        assert any('"content":"!"' in line for line in rest)
        assert "data: [DONE]" in rest
        assert await asyncio.wait_for(gateway.process.wait(), 30) == 0


async def test_an_answer_that_outlasts_the_drain_ends_with_an_error_event() -> None:
    async with (
        running_engine() as engine,
        program(
            *("--port", "0", "--drain-seconds", "0.2"), NANOCHAT_GATEWAY_ENGINE_ADDRESSES=engine.address
        ) as gateway,
    ):
        url = f"http://{(await gateway.event('ready'))['address']}"
        await until_ready(url)
        engine.script = hanging("hello")
        async with (
            http_client(url) as http,
            http.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}) as answer,
        ):
            lines = answer.aiter_lines()
            while "hello" not in await anext(lines):
                pass
            gateway.process.terminate()
            rest = [line async for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert (await gateway.event("drained"))["answers_cut"] == 1
        assert await asyncio.wait_for(gateway.process.wait(), 30) == 0


async def startup_of_early_uvicorn(server: uvicorn.Server, _sockets: Any = None) -> None:
    """The beginning of ``Server.startup`` of uvicorn 0.34. The rest, for an app that has started, is left out."""
    await server.lifespan.startup()
    server.should_exit = server.lifespan.should_exit


@pytest.mark.parametrize("early", [False, True], ids=["installed uvicorn", "early uvicorn"])
async def test_a_gateway_that_cannot_start_fails_and_does_not_call_itself_ready(
    early: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise RuntimeError("the keys are unreadable")

    settings = GatewaySettings(engine_addresses=("127.0.0.1:1",), static_dir="/nonexistent")
    app = create_app(settings)
    monkeypatch.setattr(app.state.admission, "start", fail)
    if early:
        monkeypatch.setattr(uvicorn.Server, "startup", startup_of_early_uvicorn)
    with listen("127.0.0.1", 0) as listener, caplog.at_level(logging.INFO), pytest.raises(SystemExit) as ended:
        await Server(app, settings).serve(sockets=[listener])
    assert ended.value.code not in (None, 0)
    assert "ready" not in [record.message for record in caplog.records]
    assert any("the keys are unreadable" in str(record.exc_info or record.message) for record in caplog.records)


async def test_a_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.gateway", "--port", str(taken.getsockname()[1])),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert "cannot listen on 127.0.0.1" in errors.decode().splitlines()[-1]
    assert "Traceback" not in errors.decode()
