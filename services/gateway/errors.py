"""Errors as clients see them: OpenAI's JSON object, with one HTTP status for each cause."""

import json
from collections.abc import Collection, Sequence
from typing import Any

import grpc
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

RETRY_AFTER_SECONDS = 2

# OpenAI's error types by status. Every other status below 500 is an invalid_request_error; from 500 on, the type is
# server_error.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

# The engine names a wrong constraint in its trailing metadata. This table has the request's parameter for each name.
_CONSTRAINT_PARAMETERS = {"json_schema": "response_format.json_schema.schema", "regex": "regex"}


class ApiError(HTTPException):
    """A failure with the HTTP status and the message that the client gets."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """``param`` is the request's wrong parameter, such as ``messages[2].content``.

        ``code`` is an error code that programs can compare.
        """
        # These two statuses mean that a later attempt may succeed, but the gateway can't know when.
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else None
        super().__init__(status, detail=message, headers=headers)
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> bytes:
        """The JSON object that the client gets.

        The JSON is ASCII, because a message may quote lone surrogates that the client sent. UTF-8 can't encode lone
        surrogates.
        """
        status = self.status_code
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The whole HTTP response, for a request that failed before the gateway had sent anything."""
        return Response(self.body, self.status_code, headers=self.headers, media_type="application/json")


class ClientGone(HTTPException):
    """The client closed the connection before its answer was complete. Only the request log sees the status 499."""

    def __init__(self) -> None:
        super().__init__(499, detail="The client closed the connection.")


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    """Returns an error with status 400: the client must change the request."""
    return ApiError(400, message, param=param, code=code)


def invalid_value(message: str, param: str) -> ApiError:
    """Returns an error with status 400: the value of ``param`` is wrong."""
    return bad_request(message, param, "invalid_value")


_EXAMPLE = bad_request("Missing required parameter: messages.", "messages", "missing_required_parameter")
# Describes the errors of an endpoint in the OpenAPI document.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"description": "An error.", "content": {"application/json": {"example": json.loads(_EXAMPLE.body)}}}
}


def shutting_down() -> ApiError:
    """Returns an error with status 503: this gateway process is about to end."""
    return ApiError(503, "The gateway is shutting down; send the request again.", code="shutting_down")


def no_engine() -> ApiError:
    """Returns an error with status 503: no engine can answer at the moment."""
    message = "No engine is ready: the model is still loading, or its engine can't be reached. Try again shortly."
    return ApiError(503, message, code="engine_unavailable")


def engines_busy() -> ApiError:
    """Returns an error with status 503: no engine had room within the time that a request may wait."""
    return ApiError(503, "All engines are busy. Try again shortly.", code="engine_overloaded")


def queue_full() -> ApiError:
    """Returns an error with status 429: too many requests wait for an engine already."""
    return ApiError(429, "Too many requests are waiting for an engine. Try again shortly.", code="engine_overloaded")


def model_not_found(name: str, known: Collection[str]) -> ApiError:
    """Returns an error with status 404: the engines serve the ``known`` models only."""
    message = f"The model {name!r} does not exist here; this server has {', '.join(sorted(known))}."
    return ApiError(404, message, param="model", code="model_not_found")


def internal_error(request_id: str) -> ApiError:
    """Returns an error with status 500: the gateway has a bug, and its log has the details."""
    message = f"The gateway failed on this request; its id in the log is {request_id}."
    return ApiError(500, message, code="internal_error")


def from_rpc(error: grpc.aio.AioRpcError, *, started: bool) -> ApiError:
    """Translates an engine's gRPC error; ``started`` says whether the engine had already sent a part of the answer."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        param = _CONSTRAINT_PARAMETERS.get(dict(error.trailing_metadata() or ()).get("invalid-field", ""))
        if param is not None:
            return invalid_value(f"Invalid {param}: {details}.", param)
        return ApiError(400, details or "The engine refused the request.", code="invalid_request")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        message = "The engine has as many requests as it can hold; try again shortly."
        return ApiError(429, message, code="engine_overloaded")
    # An engine cancels running gRPC calls only while it shuts down.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        reached = "The engine can't be reached at the moment; try again shortly."
        stopped = "The engine stopped in the middle of the answer; send the request again."
        return ApiError(503, stopped if started else reached, code="engine_unavailable")
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        message = "The model was replaced while the request was on its way; send it again."
        return ApiError(503, message, code="engine_unavailable")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ApiError(504, "The answer took longer than this server allows; ask for fewer tokens.", code="timeout")
    return ApiError(500, "The engine failed on this request.", code="engine_error")


def _from_validation(error: RequestValidationError, content_type: str) -> ApiError:
    """Translates the first error that pydantic found in a request body."""
    first = error.errors()[0]
    location = first["loc"][1:]
    if first["type"] == "json_invalid":
        return bad_request(f"The request body is not valid JSON: {first['ctx']['error']}.", None, "invalid_json")
    if not location:
        if first["type"] == "missing":
            return bad_request("The request has no body; send a JSON object.", None)
        if "json" not in content_type:
            return bad_request("Send the request body as JSON, with the header Content-Type: application/json.", None)
        return bad_request("The request body must be a JSON object.", None)
    param = _parameter_name(location)
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: {param}.", param, "missing_required_parameter")
    return invalid_value(f"Invalid {param}: {first['msg']}.", param)


def _parameter_name(location: Sequence[str | int]) -> str:
    """Writes ``("messages", 0, "content")`` as ``messages[0].content``."""
    name = ""
    for step in location:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answers an :class:`ApiError` or an error of the framework with the same JSON shape."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        message, code = str(error.detail), None
        if error.status_code in (404, 405):
            message, code = f"There is no {request.method} {request.url.path} here.", "unknown_url"
        error = ApiError(error.status_code, message, code=code)
    request.state.record.error = error.code  # for the request log
    return error.response()


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Answers 400 instead of the framework's 422, because OpenAI's clients expect 400."""
    assert isinstance(error, RequestValidationError)
    return await on_http_error(request, _from_validation(error, request.headers.get("content-type", "")))
