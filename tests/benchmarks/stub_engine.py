"""An engine that answers every request with the same tokens, without a model.

It speaks the engine's gRPC protocol on one port and OpenAI's REST API on another one, so that the gateway and proxies
of other projects can be measured on the same engine: ``python -m tests.benchmarks.stub_engine --grpc-port 50051
--http-port 8001 --tokens 64 --pause 0.02``. It prints a line when it is ready. A request's ``max_tokens`` shortens its
answer.
"""

import argparse
import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nanochat_core.protos import engine_pb2 as pb
from tests.support.scripted_engine import ScriptedEngine, chunk, ids

MODEL = "nano"
WORD = "a"


class StubEngine(ScriptedEngine):
    """A scripted engine that does not store its requests."""

    def __init__(self, tokens: int, pause: float, **options: Any) -> None:
        super().__init__(name=MODEL, context_length=100_000, **options)
        self._tokens, self._pause = tokens, pause
        [self._token] = ids(WORD)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        count = min(self._tokens, request.sampling.max_tokens or self._tokens)
        for _ in range(count - 1):
            yield chunk([self._token])
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.5))
        usage = pb.Usage(prompt_tokens=len(request.prompt_token_ids), completion_tokens=count)
        yield chunk([self._token], finish=pb.FINISH_REASON_LENGTH, usage=usage)


def openai_api(tokens: int, pause: float) -> Starlette:
    """Create a REST server in OpenAI's format that gives the same answers as the gRPC engine."""

    def body(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        choices = [{"index": 0, "finish_reason": None, **choice}]
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": MODEL, "choices": choices}

    async def parts(count: int) -> AsyncIterator[bytes]:
        for i in range(count):
            choice: dict[str, Any] = {"delta": {"content": WORD, **({} if i else {"role": "assistant"})}}
            if i == count - 1:
                choice["finish_reason"] = "length"
            yield f"data: {json.dumps(body('chat.completion.chunk', choice))}\n\n".encode()
            if i < count - 1:
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        yield b"data: [DONE]\n\n"

    async def complete(request: Request) -> Response:
        asked = await request.json()
        count = min(tokens, asked.get("max_tokens") or asked.get("max_completion_tokens") or tokens)
        if asked.get("stream"):
            return StreamingResponse(parts(count), media_type="text/event-stream")
        await asyncio.sleep(pause * (count - 1))
        message = {"role": "assistant", "content": WORD * count}
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        whole = body("chat.completion", {"message": message, "finish_reason": "length"})
        return JSONResponse({**whole, "usage": usage})

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "stub"}]})

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ]
    )


async def serve(options: argparse.Namespace) -> None:
    engine = StubEngine(options.tokens, options.pause, address=f"127.0.0.1:{options.grpc_port}")
    await engine.start()
    settings = {"host": "127.0.0.1", "port": options.http_port, "log_level": "warning", "access_log": False}
    server = uvicorn.Server(uvicorn.Config(openai_api(options.tokens, options.pause), **settings))
    print(f"ready {engine.address}", flush=True)
    await server.serve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc-port", type=int, default=50051)
    parser.add_argument("--http-port", type=int, default=8001)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--pause", type=float, default=0.02, help="mean seconds between two tokens")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
