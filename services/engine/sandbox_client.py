"""Sends the model's Python calls to the sandbox service."""

import logging

import grpc

from nanochat_core.chat import tool_output_text
from nanochat_core.engine import ToolOutput
from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc

log = logging.getLogger("nanochat.engine")

# The sandbox limits the code's time itself and then answers TIMEOUT. The client waits this much longer for the answer.
_ANSWER_SECONDS = 1.0


class SandboxClient:
    """A :class:`~nanochat_core.engine.ToolRunner` that calls the sandbox service over gRPC."""

    def __init__(self, address: str) -> None:
        # After a restart of the sandbox, answers must not wait for gRPC's default backoff of up to two minutes.
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
        self._channel = grpc.aio.insecure_channel(address, options=options)
        self._stub = sandbox_pb2_grpc.SandboxStub(self._channel)

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        """Run ``code``. A sandbox that has not answered in time raises :class:`TimeoutError`.

        If the sandbox cannot be reached, the output is an error message that the model can read.
        """
        request = sandbox_pb2.ExecuteRequest(
            request_id=request_id,
            code=code,
            limits=sandbox_pb2.Limits(wall_seconds=max(timeout_seconds - _ANSWER_SECONDS, timeout_seconds / 2)),
            result_format=sandbox_pb2.RESULT_FORMAT_STR,
        )
        try:
            reply = await self._stub.Execute(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            log.warning(
                "sandbox call failed",
                extra={"request_id": request_id, "code": error.code().name, "detail": error.details()},
            )
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError from error
            return ToolOutput("unavailable", "error: the Python sandbox is unavailable")
        status = sandbox_pb2.Status.Name(reply.status).removeprefix("STATUS_").lower()
        result = reply.result if reply.HasField("result") else None
        return ToolOutput(status, tool_output_text(result, reply.stdout, reply.error))

    async def close(self) -> None:
        """Close the connection. Running calls fail."""
        await self._channel.close()
