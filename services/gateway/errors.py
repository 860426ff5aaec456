"""Errors as clients see them: OpenAI's JSON object, with one HTTP status for each cause."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import grpc
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nanochat_core.redaction import redact

RETRY_AFTER_SECONDS = 2
# An error message repeats at most this many characters of a text that the client sent.
_SHOWN_CHARACTERS = 100

# OpenAI's error types by status. Every other status below 500 is an invalid_request_error; from 500 on, the type is
# server_error.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A failure with the HTTP status and the message that the client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``param`` is the name of the request's wrong parameter, such as ``messages[2].content``.

        ``code`` is an error code that programs can compare. ``headers`` are added to the response.
        """
        # The statuses 429 and 503 mean that a later attempt may succeed. The gateway can't know when, so it names a
        # fixed time.
        if headers is None and status in (429, 503):
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        super().__init__(status, detail=message, headers=headers)
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> bytes:
        """The JSON object that the client gets."""
        status = self.status_code
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        error = {"message": redact(self.message), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The whole HTTP response, for a request that failed before the gateway had sent anything."""
        return Response(self.body, self.status_code, headers=self.headers, media_type="application/json")


class ClientGone(HTTPException):
    """The client closed the connection before its answer was complete.

    The status 499 appears in the request log, in the metrics and in the trace.
    """

    def __init__(self) -> None:
        super().__init__(499, detail="The client closed the connection.")


def shown(text: str) -> str:
    """Returns the text as an error may repeat it: cut after 100 characters, because the client chose its length."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


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


def unauthorized(message: str) -> ApiError:
    """Returns an error with status 401: the request's API key is missing, wrong, revoked or expired."""
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def not_allowed(scope: str) -> ApiError:
    """Returns an error with status 403: the caller lacks the ``scope`` (permission) that its request needs."""
    message = f"This caller may not do that: it needs an API key with the scope {scope}."
    return ApiError(403, message, code="missing_scope")


def rate_limited(message: str, *, retry_seconds: float | None) -> ApiError:
    """Returns an error with status 429: the caller has reached one of its limits.

    The limit has room again in ``retry_seconds`` seconds. None means that the same request can never pass; the header
    ``x-should-retry`` then tells OpenAI's client libraries not to retry.
    """
    if retry_seconds is None:
        headers = {"x-should-retry": "false"}
    else:
        milliseconds = math.ceil(retry_seconds * 1000)
        headers = {"Retry-After": str(max(1, math.ceil(retry_seconds))), "retry-after-ms": str(milliseconds)}
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers)


def admission_unavailable() -> ApiError:
    """Returns an error with status 503: keys or limits cannot be checked at the moment."""
    message = "API keys and limits cannot be checked at the moment. Try again shortly."
    return ApiError(503, message, code="admission_unavailable")


def model_not_found(name: str, known: Collection[str]) -> ApiError:
    """Returns an error with status 404: the engines serve the ``known`` models only."""
    message = f"The model {shown(name)!r} does not exist here; this server serves {', '.join(sorted(known))}."
    return ApiError(404, message, param="model", code="model_not_found")


def internal_error(request_id: str) -> ApiError:
    """Returns an error with status 500: the gateway has a bug, and its log has the details."""
    message = f"The gateway failed on this request; its id in the log is {request_id}."
    return ApiError(500, message, code="internal_error")


def from_rpc(error: grpc.aio.AioRpcError, *, started: bool, constraint: str | None = None) -> ApiError:
    """Translates an engine's gRPC error to the error that the client gets.

    ``started`` says whether the engine had already sent a part of the answer. ``constraint`` is the request's parameter
    that constrains the answer.
    """
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        # Only if the constraint is wrong, the engine names a field in its trailing metadata. The error then names the
        # parameter that sets the constraint.
        if constraint is not None and "invalid-field" in dict(error.trailing_metadata() or ()):
            return invalid_value(f"Invalid {constraint}: {details}.", constraint)
        return ApiError(400, details or "The engine refused the request.", code="invalid_request")
    if is_caller_limit(error):
        return rate_limited(f"{details[:1].upper()}{details[1:]}.", retry_seconds=1)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        message = "The engine has as many requests as it can hold; try again shortly."
        return ApiError(429, message, code="engine_overloaded")
    # An engine cancels running gRPC calls only while it shuts down, so CANCELLED means the same as UNAVAILABLE.
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


def is_caller_limit(error: grpc.aio.AioRpcError) -> bool:
    """Whether an engine refused the request because its caller has too many requests there.

    The engine may have room for requests of other callers.
    """
    trailing = dict(error.trailing_metadata() or ())
    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "caller-limit" in trailing


def _from_validation(error: RequestValidationError, content_type: str) -> ApiError:
    """Translates the first error that pydantic found in a request to the error that the client gets."""
    first = error.errors()[0]
    location = first["loc"][1:]
    if not location:
        if first["type"] == "invalid_value":
            return bad_request(f"Invalid request body: {first['msg']}.", None, "invalid_value")
        if first["type"] == "missing":
            return bad_request("The request has no body; send a JSON object.", None, "missing_body")
        if "json" not in content_type:
            message = "Send the request body as JSON, with the header Content-Type: application/json."
            return bad_request(message, None, "invalid_content_type")
        return bad_request("The request body must be a JSON object.", None, "invalid_json")
    param = _parameter_name(location)
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: {param}.", param, "missing_required_parameter")
    return invalid_value(f"Invalid {param}: {first['msg']}.", param)


def _parameter_name(location: Sequence[str | int]) -> str:
    """Writes ``("messages", 0, "content")`` as ``messages[0].content``."""
    name = ""
    for step in location:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return shown(name)  # cuts the name, because a key in the request's JSON may be very long


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answers an :class:`ApiError` or an error of the framework. Both answers have OpenAI's JSON form."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        path = f"{request.method} {shown(request.url.path)}"
        message, code = str(error.detail), None
        if error.status_code == 404:
            message, code = f"There is no {path} here.", "unknown_url"
        elif error.status_code == 405:
            message, code = f"There is no {path} here; the header Allow lists the methods.", "method_not_allowed"
        error = ApiError(error.status_code, message, code=code, headers=error.headers)
    request.state.record.error = error.code  # for the request log
    return error.response()


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Answers 400 instead of the framework's 422, because OpenAI's clients expect 400."""
    assert isinstance(error, RequestValidationError)
    return await on_http_error(request, _from_validation(error, request.headers.get("content-type", "")))
