"""The methods of the Sandbox service in ``sandbox.proto``."""

import dataclasses
import logging
import time

import grpc

from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.sandbox import Limits, ResultFormat, SandboxExecutor, WorkerFailed
from nanochat_core.tracing.span import current_span
from services.sandbox.metrics import Metrics

log = logging.getLogger("nanochat.sandbox")

_FORMATS = {sandbox_pb2.RESULT_FORMAT_REPR: ResultFormat.REPR, sandbox_pb2.RESULT_FORMAT_STR: ResultFormat.STR}


class SandboxServicer(sandbox_pb2_grpc.SandboxServicer):
    """Answers every valid call with a status. A gRPC error means an invalid request or a failure of the sandbox."""

    def __init__(self, executor: SandboxExecutor, metrics: Metrics, max_code_bytes: int) -> None:
        self._executor = executor
        self._metrics = metrics
        self._max_code_bytes = max_code_bytes

    async def Execute(
        self, request: sandbox_pb2.ExecuteRequest, context: grpc.aio.ServicerContext
    ) -> sandbox_pb2.ExecuteReply:
        """Run the code. If the client cancels the call, gRPC cancels this coroutine. This kills the code's process."""
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
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        facts = {"request_id": request.request_id, "code_bytes": size}
        started = time.monotonic()
        try:
            result = await self._executor.execute(request.code, limits, _FORMATS[request.result_format])
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
                "cpu_seconds": round(result.usage.cpu_seconds, 6),
                "peak_memory_bytes": result.usage.peak_memory_bytes,
                "truncated": result.truncated,
            },
        )
        fields = dataclasses.asdict(result) | {"status": f"STATUS_{result.status.name}"}
        return sandbox_pb2.ExecuteReply(**fields)

    async def GetInfo(
        self, _request: sandbox_pb2.GetInfoRequest, _context: grpc.aio.ServicerContext
    ) -> sandbox_pb2.Info:
        """Describe the isolation profile, the concurrency and the limits."""
        config = self._executor.config
        return sandbox_pb2.Info(
            profile=self._executor.profile,
            concurrency=config.concurrency,
            default_limits=sandbox_pb2.Limits(**dataclasses.asdict(config.default_limits)),
            maximum_limits=sandbox_pb2.Limits(**dataclasses.asdict(config.maximum_limits)),
        )
