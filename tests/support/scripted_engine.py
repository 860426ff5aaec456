"""A gRPC server with the engine's protocol, and a gateway in front of it. Tests write the answers as scripts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from nanochat_core.discovery import addresses_of
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.protos import engine_pb2_grpc
from nanochat_core.tokenizer import Tokenizer
from services.gateway.app import create_app
from services.gateway.engines.pool import Lookup
from services.gateway.server import Server, listen
from services.gateway.settings import GatewaySettings
from tests.support.held_port import HeldPort

TOKENIZER = Tokenizer(
    [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello", b"th", b"the", b" wor", b"ld"]
)
SPECIAL = TOKENIZER.special_ids

Script = Callable[[pb.GenerateRequest, grpc.aio.ServicerContext], AsyncIterator[pb.GenerateChunk]]


def ids(*parts: str | bytes) -> list[int]:
    """Returns the token ids of all parts. A part is a text, bytes or the name of a special token."""
    made: list[int] = []
    for part in parts:
        if isinstance(part, bytes):
            made += list(part)
        else:
            made += [SPECIAL[part]] if part in SPECIAL else TOKENIZER.encode(part)
    return made


def chunk(
    tokens: list[int],
    *,
    index: int = 0,
    events: list[pb.ToolEvent] | None = None,
    finish: int = pb.FINISH_REASON_UNSPECIFIED,
    usage: pb.Usage | None = None,
    logprobs: bool = False,
    alternatives: int = 0,
) -> pb.GenerateChunk:
    """Builds a chunk. With ``logprobs``, the token with id ``i`` has the log probability -i/100. Its alternatives are
    the tokens with the next ids.
    """
    made = [
        pb.Token(
            id=i,
            logprob=-i / 100 if logprobs else None,
            top_logprobs=[pb.TopLogprob(token_id=i + k, logprob=-(i + k) / 100) for k in range(alternatives)],
        )
        for i in tokens
    ]
    return pb.GenerateChunk(index=index, tokens=made, tool_events=events, finish_reason=finish, usage=usage)


def saying(
    *parts: str | bytes, finish: int = pb.FINISH_REASON_STOP, pause: float = 0.0, until: asyncio.Event | None = None
) -> Script:
    """Returns a script that, for every choice, sends each token in a chunk of its own, and the end token last.

    The script waits ``pause`` seconds after each token, and for ``until`` before the last token.
    """

    async def script(request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
        wanted = request.sampling.HasField("logprobs")
        end = ["<|assistant_end|>"] if finish == pb.FINISH_REASON_STOP else []
        tokens = ids(*parts, *end)
        for index in range(max(request.n, 1)):
            for k, token in enumerate(tokens):
                last = k == len(tokens) - 1
                if last and until is not None:
                    await until.wait()
                yield chunk(
                    [token],
                    index=index,
                    finish=finish if last else pb.FINISH_REASON_UNSPECIFIED,
                    usage=pb.Usage(
                        prompt_tokens=len(request.prompt_token_ids),
                        completion_tokens=len(tokens),
                        cached_prompt_tokens=2,
                    )
                    if last
                    else None,
                    logprobs=wanted and token < len(TOKENIZER.token_bytes),
                    alternatives=request.sampling.logprobs,
                )
                await asyncio.sleep(pause)

    return script


def failing(code: grpc.StatusCode, details: str, *, after: Script | None = None) -> Script:
    """Returns a script that sends all chunks of ``after`` except the last, and then aborts."""

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        if after is not None:
            async for part in after(request, context):
                if part.finish_reason:
                    break
                yield part
        await context.abort(code, details)

    return script


def hanging(*parts: str) -> Script:
    """Returns a script that sends ``parts`` and then never anything else."""

    async def script(request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
        if parts:
            yield chunk(ids(*parts))
        await asyncio.Event().wait()

    return script


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The health service of an engine. It answers only while the engine is awake."""

    def __init__(self, engine: "ScriptedEngine") -> None:
        super().__init__()
        self._engine = engine

    async def Check(self, request: Any, context: Any) -> Any:
        await self._engine.awake.wait()
        return await super().Check(request, context)


class ScriptedEngine(engine_pb2_grpc.EngineServicer):
    """An engine that runs a test's script.

    Attributes:
        script: answers the next requests.
        requests, metadata: the requests so far and their gRPC metadata.
        cancelled: semaphore that is released once for each call that the gateway canceled.
        looks: number of requests for the engine's load so far.
        progress: the progress of the training; if None, the engine refuses ``GetProgress`` as unimplemented.
        progress_reads: number of requests for the progress so far.
        awake: while this event is cleared, the engine answers nothing, like a stopped process.
    """

    def __init__(
        self,
        *,
        name: str = "nano",
        context_length: int = 256,
        tokenizer: Tokenizer = TOKENIZER,
        address: str = "127.0.0.1:0",
    ) -> None:
        self.script: Script = saying("hello")
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = asyncio.Semaphore(0)
        self.load = pb.Load()
        self.looks = 0
        self.progress: pb.Progress | None = None
        self.progress_reads = 0
        self.address = address
        self.info = pb.ModelInfo(
            name=name,
            revision="sft/step_10",
            digests={"model.safetensors": "00"},
            context_length=context_length,
            vocab_size=tokenizer.vocab_size,
            tokenizer_json=tokenizer.to_json().encode(),
            compute_dtype="float32",
            parameters=1234,
        )
        self._server: grpc.aio.Server | None = None
        self._held: HeldPort | None = None
        self.health = _Health(self)
        self.awake = asyncio.Event()
        self.awake.set()

    def forget(self) -> None:
        """Forgets the requests and the canceled calls so far, so that the next test sees only its own."""
        self.requests.clear()
        self.metadata.clear()
        self.cancelled = asyncio.Semaphore(0)

    async def start(self) -> None:
        """Starts to listen. After a restart the address is the same as before."""
        if self._held is None:
            host, _, wanted = self.address.rpartition(":")
            self._held = HeldPort(host.strip("[]"), int(wanted))
            self.address = f"{host}:{self._held.port}"
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        engine_pb2_grpc.add_EngineServicer_to_server(self, self._server)
        self.health = _Health(self)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        await self.health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        """Stops immediately and breaks off running calls."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        complete = False
        try:
            async for part in self.script(request, context):
                yield part
            complete = True
        finally:
            if not complete:
                self.cancelled.release()

    async def GetModel(self, _request: Any, _context: Any) -> pb.ModelInfo:
        await self.awake.wait()
        return self.info

    async def GetLoad(self, _request: Any, _context: Any) -> pb.Load:
        await self.awake.wait()
        self.looks += 1
        return self.load

    async def GetProgress(self, _request: Any, context: Any) -> pb.Progress:
        self.progress_reads += 1
        if self.progress is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not implemented!")
            raise AssertionError("abort raises")
        return self.progress

    async def looked_at(self) -> None:
        """Waits until a gateway has read the engine's current health, load and model."""
        seen = self.looks
        async with asyncio.timeout(30):
            while self.looks < seen + 3:
                await asyncio.sleep(0.02)


def http_client(url: str) -> httpx.AsyncClient:
    """Returns an HTTP client without TLS verification. Setting TLS up takes longer than most tests."""
    return httpx.AsyncClient(base_url=url, verify=False, timeout=120)


def openai_client(url: str) -> openai.AsyncOpenAI:
    """Returns an OpenAI client that reports the first failure instead of trying again."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, http_client=http_client(url))


async def until_ready(url: str, *, ready: bool = True) -> None:
    """Waits until an engine serves a model; if ``ready`` is false, waits until no engine serves a model."""
    async with http_client(url) as http, asyncio.timeout(30):
        while bool((await http.get("/readyz")).json()["models"]) != ready:
            await asyncio.sleep(0.02)


async def until_up(url: str, count: int) -> None:
    """Waits until the gateway has ``count`` engines that it can use."""
    async with http_client(url) as http, asyncio.timeout(30):
        while True:
            lines = (await http.get("/metrics")).text.splitlines()
            up = [line for line in lines if line.startswith("nanochat_gateway_engine_up{") and line.endswith(" 1.0")]
            if len(up) == count:
                return
            await asyncio.sleep(0.02)


async def until_queued(url: str, count: int) -> None:
    """Waits until ``count`` requests wait in the gateway's queue."""
    async with http_client(url) as http, asyncio.timeout(30):
        while f"nanochat_gateway_queue_length {count:.1f}" not in (await http.get("/metrics")).text.splitlines():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running_engine(**options: Any) -> AsyncIterator[ScriptedEngine]:
    """Runs a scripted engine for the time of the block."""
    engine = ScriptedEngine(**options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@contextlib.asynccontextmanager
async def running_gateway(
    *addresses: str, static: Path | None = None, lookup: Lookup = addresses_of, **changes: Any
) -> AsyncIterator[str]:
    """Runs a gateway on a free port in this event loop, and yields its base URL.

    The gateway calls ``lookup`` to find the addresses of a host name. On a busy machine, everything may happen late, so
    the gateway takes no engine for hung, refuses no request that waits and sends no heartbeat, unless ``changes`` set
    shorter times.
    """
    settings = GatewaySettings(
        **{
            "engine_addresses": addresses,
            "poll_seconds": 0.05,
            "model_poll_seconds": 0.05,
            "health_timeout_seconds": 60.0,
            "queue_seconds": 60.0,
            "heartbeat_seconds": 60.0,
            "static_dir": str(static or "/nonexistent"),
            **changes,
        }
    )
    listener = listen("127.0.0.1", 0)
    server = Server(create_app(settings, lookup), settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.01)
            assert not serving.done(), "the gateway ended at start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
