"""Runs the model's Python calls in the sandbox services."""

import contextvars
import os
from collections.abc import Callable, Sequence

import grpc

from nanochat_core.chat import tool_output_text
from nanochat_core.discovery import LOOKUP_SECONDS
from nanochat_core.engine import Picture, ToolOutput
from nanochat_core.protos import sandbox_pb2
from nanochat_core.sandboxes import NoSandbox, Sandboxes
from nanochat_core.tls import TlsFiles
from nanochat_core.tracing.span import current_span

# Id of the caller whose request is answered in the current context; empty if the caller is unknown.
current_caller: contextvars.ContextVar[str] = contextvars.ContextVar("current_caller", default="")

_UNAVAILABLE = ToolOutput("unavailable", "error: the Python sandbox is unavailable")
# Endings of picture files that a browser can show, and the media type of each.
_MEDIA_TYPES = {
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}
# Largest number of pictures of one Python call, and their largest total size in bytes. A picture that would exceed one
# of these limits is left out.
_MAX_PICTURES, _MAX_PICTURE_BYTES = 8, 2 << 20


class SandboxClient:
    """A :class:`~nanochat_core.engine.ToolRunner` that calls the sandbox services over gRPC."""

    def __init__(
        self,
        targets: Sequence[str],
        tls: TlsFiles | None = None,
        *,
        lookup_seconds: float = LOOKUP_SECONDS,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_retry`` is called each time a call is repeated at another sandbox.

        Create the client inside the event loop that will use the client.
        """
        self._sandboxes = Sandboxes(targets, tls, lookup_seconds=lookup_seconds, on_retry=on_retry)

    @property
    def serving(self) -> int:
        """Number of sandboxes that accept calls."""
        return self._sandboxes.serving

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        """Run ``code``. Raises :class:`TimeoutError` if no sandbox answers within ``timeout_seconds``.

        If no sandbox can be reached, or if the call ends with a gRPC error, the output is an error message that the
        model can read.
        """
        span = current_span.get()
        request = sandbox_pb2.ExecuteRequest(
            request_id=span.request_id if span else request_id,
            code=code,
            limits=sandbox_pb2.Limits(wall_seconds=timeout_seconds),
            result_format=sandbox_pb2.RESULT_FORMAT_STR,
            key=current_caller.get() or request_id,
            collect_files=True,
            collect_endings=list(_MEDIA_TYPES),
        )
        try:
            return _tool_output(await self._sandboxes.execute(request, timeout_seconds))
        except (NoSandbox, grpc.aio.AioRpcError):
            return _UNAVAILABLE

    async def close(self) -> None:
        """Close the connections. Running calls fail."""
        await self._sandboxes.aclose()


def _tool_output(reply: sandbox_pb2.ExecuteReply) -> ToolOutput:
    status = sandbox_pb2.Status.Name(reply.status).removeprefix("STATUS_").lower()
    result = reply.result if reply.HasField("result") else None
    return ToolOutput(status, tool_output_text(result, reply.stdout, reply.error), _pictures(reply))


def _pictures(reply: sandbox_pb2.ExecuteReply) -> tuple[Picture, ...]:
    pictures: list[Picture] = []
    rest = _MAX_PICTURE_BYTES
    for file in reply.files:
        media_type = _MEDIA_TYPES.get(os.path.splitext(file.name)[1])
        if media_type and len(pictures) < _MAX_PICTURES and len(file.content) <= rest:
            rest -= len(file.content)
            pictures.append(Picture(file.name, media_type, file.content))
    return tuple(pictures)
