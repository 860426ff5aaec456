"""`POST /v1/sandbox/execute`: runs Python code of the client in the sandbox."""

import asyncio
import base64
import binascii
import codecs
import mimetypes
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

import grpc
import orjson
from fastapi import APIRouter, Request, Response
from pydantic import Field

from nanochat_core.protos import sandbox_pb2
from nanochat_core.sandboxes import NoSandbox, OnOutput, Sandboxes
from services.gateway.answer.event_stream import DONE, EventStream, encode_event
from services.gateway.api.dependencies import DrainDep, PoolDep, SandboxesDep
from services.gateway.api.examples import EXECUTION_RESPONSES
from services.gateway.api.json_body import JsonRoute
from services.gateway.api.parameters import check_known
from services.gateway.errors import ERROR_RESPONSES, ApiError, bad_request, invalid_value
from services.gateway.middleware.drain import cancel
from services.gateway.schemas import ApiModel

router = APIRouter(tags=["Sandbox"], responses=ERROR_RESPONSES, route_class=JsonRoute)

_MAX_FILES, _MAX_ARGUMENTS, _MAX_NAME_CHARACTERS = 256, 1024, 256
_MAX_BYTES = 2**63 - 1
_FORMATS = {"repr": sandbox_pb2.RESULT_FORMAT_REPR, "str": sandbox_pb2.RESULT_FORMAT_STR}
# Finds the media type of a file by its name. The object knows only Python's own list of types, so that the answer does
# not depend on the lists in the machine's files.
_media_types = mimetypes.MimeTypes()


class ExecutionLimits(ApiModel):
    """The resources that the code may use. 0 means the sandbox's default. Values above the sandbox's maximum are
    reduced to this maximum."""

    wall_seconds: float = Field(0, ge=0, description="seconds from the beginning of the code to its end")
    cpu_seconds: float = Field(0, ge=0, description="seconds of CPU time")
    memory_bytes: int = Field(0, ge=0, le=_MAX_BYTES, description="bytes of memory that the code may use")
    output_bytes: int = Field(
        0, ge=0, le=_MAX_BYTES, description="largest size of each of stdout, stderr and the result, in bytes"
    )


class InputFile(ApiModel):
    """A file that the code finds in the folder in which it runs."""

    name: str = Field(description="path in the folder, such as `data/numbers.csv`")
    data: str = Field(description="the content in base64")


class SandboxRequest(ApiModel):
    """Python code and its inputs."""

    code: str = Field(description="a program; if its last statement is an expression, its value is the result")
    result_format: Literal["repr", "str"] = Field("repr", description="how the result is converted to text")
    stdin: str = Field("", description="text that the code can read from its stdin")
    argv: list[str] = Field(
        default_factory=list, max_length=_MAX_ARGUMENTS, fail_fast=True, description="arguments: `sys.argv[1:]`"
    )
    files: list[InputFile] = Field(default_factory=list, max_length=_MAX_FILES, fail_fast=True)
    collect_files: bool = Field(
        False, description="whether the answer contains the files that the code has made or changed, and its figures"
    )
    collect_endings: list[str] = Field(
        default_factory=list,
        max_length=_MAX_FILES,
        fail_fast=True,
        description="the answer contains only files whose names end with one of these texts; empty means all files",
    )
    session: str = Field(
        "",
        max_length=_MAX_NAME_CHARACTERS,
        description="name of a session: its calls share their files; empty means no session",
    )
    limits: ExecutionLimits | None = None
    stream: bool = Field(False, description="whether the output is sent while the code runs, as server-sent events")


@router.post("/v1/sandbox/execute", summary="Run Python code", responses=EXECUTION_RESPONSES)
async def execute(
    body: SandboxRequest, request: Request, pool: PoolDep, drain: DrainDep, sandboxes: SandboxesDep
) -> Response:
    """Run code in an isolated process of its own. If the code fails, the request still succeeds, and `status` in the
    answer is not `ok`."""
    record, settings = request.state.record, pool.settings
    check_known(body, settings)
    if not settings.sandbox_addresses:
        raise ApiError(404, "This server does not run code for its clients.", code="sandbox_not_offered")
    call = _Call(sandboxes, _message(body, request), settings.request_timeout_seconds)
    if body.stream:
        began = time.monotonic()
        return EventStream(call.events(), drain, record, settings.heartbeat_seconds, lambda: began)
    reply = await drain.run(call.run(), request.receive, record)
    return Response(orjson.dumps(_execution(reply)), media_type="application/json")


def _message(body: SandboxRequest, request: Request) -> sandbox_pb2.ExecuteRequest:
    limits = body.limits.model_dump(include=set(ExecutionLimits.model_fields)) if body.limits else {}
    return sandbox_pb2.ExecuteRequest(
        request_id=request.state.record.request_id,
        code=body.code,
        limits=sandbox_pb2.Limits(**limits),
        result_format=_FORMATS[body.result_format],
        key=request.state.grant.caller.id,
        stdin=body.stdin.encode(),
        argv=body.argv,
        files=[
            sandbox_pb2.File(name=file.name, content=_content(file.data, f"files[{i}].data"))
            for i, file in enumerate(body.files)
        ],
        collect_files=body.collect_files,
        collect_endings=body.collect_endings,
        session=body.session,
    )


def _content(data: str, param: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):  # text that is not ASCII raises a ValueError
        raise invalid_value(f"Invalid {param}: it is not base64.", param) from None


class _Call:
    """One call to the sandbox."""

    def __init__(self, sandboxes: Sandboxes, message: sandbox_pb2.ExecuteRequest, seconds: float) -> None:
        self._sandboxes, self._message, self._seconds = sandboxes, message, seconds

    async def run(self, on_output: OnOutput | None = None) -> sandbox_pb2.ExecuteReply:
        """Returns the reply. Raises an :class:`ApiError` if the code did not run or if it is unknown whether it did."""
        try:
            reply = await self._sandboxes.execute(self._message, self._seconds, on_output)
        except NoSandbox as error:
            raise ApiError(503, f"{error} Send the request again.", code="sandbox_unavailable") from error
        except TimeoutError as error:
            raise ApiError(504, "The call took longer than this server allows.", code="timeout") from error
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                details = error.details() or "the sandbox refused the request"
                raise bad_request(f"{details[:1].upper()}{details[1:]}.", None, "invalid_request") from error
            raise ApiError(500, "The sandbox failed on this request.", code="sandbox_error") from error
        if reply.status == sandbox_pb2.STATUS_OVERLOADED:
            message = "The sandboxes have as many calls as they can hold; try again shortly."
            raise ApiError(429, message, code="sandbox_overloaded")
        return reply

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yields the output while the code runs, then the reply, each as an encoded event."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        # A piece of the output can end within a character, so the decoders keep the incomplete bytes.
        decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}

        def show(event: sandbox_pb2.ExecuteEvent) -> None:
            name = event.WhichOneof("event")
            if name is not None and (text := decoders[name].decode(getattr(event, name))):
                queue.put_nowait(_event({"type": name, "text": text}))

        call = asyncio.create_task(self.run(show))
        call.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            yield _event({"type": "result", **_execution(await call)})
            yield DONE
        finally:
            await cancel(call)


def _event(value: dict[str, Any]) -> bytes:
    return encode_event(orjson.dumps(value))


def _execution(reply: sandbox_pb2.ExecuteReply) -> dict[str, Any]:
    """Converts the reply to the JSON object that the client gets."""
    usage = reply.usage
    return {
        "object": "sandbox.execution",
        "status": sandbox_pb2.Status.Name(reply.status).removeprefix("STATUS_").lower(),
        "stdout": reply.stdout,
        "stderr": reply.stderr,
        "result": reply.result if reply.HasField("result") else None,
        "error": reply.error,
        "truncated": reply.truncated,
        # The times are rounded, because the sandbox sends them as float32. Without rounding, the JSON would show 0.002
        # as 0.0020000000949949026.
        "usage": {
            "wall_seconds": round(usage.wall_seconds, 6),
            "cpu_seconds": round(usage.cpu_seconds, 6),
            "peak_memory_bytes": usage.peak_memory_bytes,
        },
        "queue_seconds": round(reply.queue_seconds, 6),
        "profile": reply.profile,
        "files": [
            {
                "name": file.name,
                "media_type": _media_types.guess_type(file.name, strict=False)[0] or "application/octet-stream",
                "data": base64.b64encode(file.content).decode(),
            }
            for file in reply.files
        ],
        "files_complete": reply.files_complete,
        "session_new": reply.session_new,
    }
