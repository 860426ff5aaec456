"""The methods of the Sandbox service in ``sandbox.proto``."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator

import grpc

from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.sandbox import Inputs, Limits, OnData, ResultFormat, SandboxExecutor, WorkerFailed
from nanochat_core.tracing.span import current_span
from services.sandbox.metrics import Metrics

log = logging.getLogger("nanochat.sandbox")

# The log shows only this many characters of a request id, because the client chooses its length.
_LOGGED_ID_CHARACTERS = 128
# Time for sending the replies of the calls that the end of the drain has interrupted.
_REPLY_SECONDS = 2.0

_FORMATS = {sandbox_pb2.RESULT_FORMAT_REPR: ResultFormat.REPR, sandbox_pb2.RESULT_FORMAT_STR: ResultFormat.STR}


class SandboxServicer(sandbox_pb2_grpc.SandboxServicer):
    """Runs code and answers with a status, even if the code fails.

    A call ends with a gRPC error only if the request is invalid, if the sandbox fails or if the service shuts down.
    """

    def __init__(self, executor: SandboxExecutor, metrics: Metrics, max_code_bytes: int) -> None:
        self._executor = executor
        self._metrics = metrics
        self._max_code_bytes = max_code_bytes
        self._calls = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Refuse new calls, and let running calls finish for up to ``seconds``.

        Then close the executor, which kills the calls that still run.
        """
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        await asyncio.to_thread(self._executor.close)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _REPLY_SECONDS)

    async def Execute(
        self, request: sandbox_pb2.ExecuteRequest, context: grpc.aio.ServicerContext
    ) -> sandbox_pb2.ExecuteReply:
        """Run the request's code. If the client cancels the call, gRPC cancels this coroutine, which kills the code."""
        return await self._count(request, context)

    async def ExecuteStream(
        self, request: sandbox_pb2.ExecuteRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[sandbox_pb2.ExecuteEvent]:
        """Run the request's code as :meth:`Execute` does, and send the code's output while the code runs."""
        events: asyncio.Queue[sandbox_pb2.ExecuteEvent | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(name: str, data: bytes) -> None:
            stdout = name == "stdout"
            event = sandbox_pb2.ExecuteEvent(stdout=data) if stdout else sandbox_pb2.ExecuteEvent(stderr=data)
            loop.call_soon_threadsafe(events.put_nowait, event)

        call = asyncio.create_task(self._count(request, context, send))
        call.add_done_callback(lambda _: loop.call_soon_threadsafe(events.put_nowait, None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield sandbox_pb2.ExecuteEvent(reply=await call)
        finally:
            call.cancel()

    async def _count(
        self,
        request: sandbox_pb2.ExecuteRequest,
        context: grpc.aio.ServicerContext,
        on_output: OnData | None = None,
    ) -> sandbox_pb2.ExecuteReply:
        """Run a call and count it, so that :meth:`drain` can wait for it. While the service drains, refuse the call."""
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the sandbox is shutting down")
        self._calls += 1
        self._idle.clear()
        try:
            return await self._execute(request, context, on_output)
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def _execute(
        self, request: sandbox_pb2.ExecuteRequest, context: grpc.aio.ServicerContext, on_output: OnData | None
    ) -> sandbox_pb2.ExecuteReply:
        size = len(request.code.encode())
        if size > self._max_code_bytes:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the code has {size} bytes; at most {self._max_code_bytes} are allowed",
            )
        if request.result_format not in _FORMATS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"result_format {request.result_format} is not known")
        try:
            asked = request.limits
            limits = Limits(asked.wall_seconds, asked.cpu_seconds, asked.memory_bytes, asked.output_bytes)
            files = {file.name: file.content for file in request.files}
            endings = tuple(request.collect_endings)
            inputs = Inputs(request.stdin, tuple(request.argv), files, request.collect_files, endings)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        facts = {"request_id": request.request_id[:_LOGGED_ID_CHARACTERS], "code_bytes": size}
        started = time.monotonic()
        try:
            text_format = _FORMATS[request.result_format]
            result = await self._executor.execute(
                request.code, limits, text_format, request.key, inputs, on_output, request.session
            )
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except WorkerFailed as error:
            self._metrics.failures.inc()
            log.error("execution failed", extra=facts | {"error": str(error)})
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        seconds = time.monotonic() - started
        self._metrics.observe(result, seconds)
        if span := current_span.get():
            span.attributes["nanochat.status"] = result.status.value
        # The log never contains the code, its output or its error, because they belong to a user's conversation.
        log.info(
            "execution",
            extra=facts
            | {
                "status": result.status.value,
                "seconds": round(seconds, 6),
                "queue_seconds": round(result.queue_seconds, 6),
                "cpu_seconds": round(result.usage.cpu_seconds, 6),
                "peak_memory_bytes": result.usage.peak_memory_bytes,
                "truncated": result.truncated,
            },
        )
        files_made = [sandbox_pb2.File(name=name, content=content) for name, content in result.files.items()]
        fields = dataclasses.asdict(result) | {"status": f"STATUS_{result.status.name}", "files": files_made}
        return sandbox_pb2.ExecuteReply(**fields)

    async def GetInfo(
        self, _request: sandbox_pb2.GetInfoRequest, _context: grpc.aio.ServicerContext
    ) -> sandbox_pb2.Info:
        """Describe the sandbox: its isolation profile, the number of calls that may run at once, and their limits."""
        config = self._executor.config
        return sandbox_pb2.Info(
            profile=self._executor.profile,
            concurrency=config.concurrency,
            default_limits=sandbox_pb2.Limits(**dataclasses.asdict(config.default_limits)),
            maximum_limits=sandbox_pb2.Limits(**dataclasses.asdict(config.maximum_limits)),
        )
