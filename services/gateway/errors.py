"""Errors as clients see them: one JSON shape, one status for each cause."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import grpc
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

# Asked of a client when the gateway cannot know how long the trouble will last.
RETRY_AFTER_SECONDS = 2

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}

# What the engine says in its trailing metadata of a wrong constraint, as the client wrote it.
_PARAMETERS = {"json_schema": "response_format.json_schema.schema", "regex": "regex"}


# For the OpenAPI description of an endpoint.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error.",
        "content": {
            "application/json": {
                "example": {
                    "error": {
                        "message": "Missing required parameter: messages.",
                        "type": "invalid_request_error",
                        "param": "messages",
                        "code": "missing_required_parameter",
                    }
                }
            }
        },
    }
}


class ApiError(HTTPException):
    """A failure with the status and the words that the client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """
        Args:
            status: HTTP status.
            message: what was wrong and what to do, for a person.
            param: the request's parameter at fault, such as ``messages[2].content``.
            code: a word for programs.
            retry_after: seconds to wait before another attempt.
        """
        headers = {"Retry-After": str(retry_after)} if retry_after is not None else None
        super().__init__(status, detail=message, headers=headers)
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        status = self.status_code
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    """400: the request can't be served as it is."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """503: this gateway is about to end; another one, or this one restarted, will serve the request."""
    return ApiError(
        503,
        "The gateway is shutting down; send the request again.",
        code="shutting_down",
        retry_after=RETRY_AFTER_SECONDS,
    )


def model_not_found(name: str, known: Collection[str]) -> ApiError:
    """404: the server runs other models."""
    return ApiError(
        404,
        f"The model {name!r} does not exist here; this server has {', '.join(sorted(known))}.",
        param="model",
        code="model_not_found",
    )


def no_engine() -> ApiError:
    """503: nothing can answer at the moment."""
    return ApiError(
        503,
        "No engine is ready: the model is still loading, or its engine can't be reached. Try again shortly.",
        code="engine_unavailable",
        retry_after=RETRY_AFTER_SECONDS,
    )


def from_rpc(error: grpc.aio.AioRpcError, *, started: bool) -> ApiError:
    """What an engine's failure means to the client.

    Args:
        started: whether part of the answer has come already.
    """
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        param = _PARAMETERS.get(dict(error.trailing_metadata() or ()).get("invalid-field", ""))
        if param is not None:
            return bad_request(f"Invalid {param}: {details}.", param, "invalid_value")
        return ApiError(400, details or "The engine refused the request.", code="invalid_request")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ApiError(
            429,
            "The engine has as many requests as it can hold; try again shortly.",
            code="engine_overloaded",
            retry_after=RETRY_AFTER_SECONDS,
        )
    # A server that is torn down cancels its calls; nobody else cancels them from that side.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        message = (
            "The engine stopped in the middle of the answer; send the request again."
            if started
            else "The engine can't be reached at the moment; try again shortly."
        )
        return ApiError(503, message, code="engine_unavailable", retry_after=RETRY_AFTER_SECONDS)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        message = "The model was replaced while the request was on its way; send it again."
        return ApiError(503, message, code="engine_unavailable", retry_after=RETRY_AFTER_SECONDS)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ApiError(504, "The answer took longer than this server allows; ask for fewer tokens.", code="timeout")
    return ApiError(500, "The engine failed on this request.", code="engine_error")


def from_validation(error: RequestValidationError, content_type: str) -> ApiError:
    """The first thing that is wrong with a request body, in the client's words for it."""
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
    param = parameter_name(location)
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: {param}.", param, "missing_required_parameter")
    return bad_request(f"Invalid {param}: {first['msg']}.", param, "invalid_value")


def parameter_name(location: Sequence[str | int]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    name = ""
    for step in location:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name


def error_response(error: ApiError) -> Response:
    """The whole answer to a request that failed before anything was sent."""
    # ASCII only: a message may quote what the client sent, lone surrogates included.
    return Response(json.dumps(error.body), error.status_code, headers=error.headers, media_type="application/json")


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answers an :class:`ApiError`, and the framework's own errors in the same shape."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        status = error.status_code
        if status in (404, 405):
            error = ApiError(status, f"There is no {request.method} {request.url.path} here.", code="unknown_url")
        else:
            error = ApiError(status, str(error.detail))
    return _answer(request, error)


def _answer(request: Request, error: ApiError) -> Response:
    # For the access log.
    request.state.record.error = error.code
    return error_response(error)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """422 of the framework becomes 400, as OpenAI's clients expect."""
    assert isinstance(error, RequestValidationError)
    return _answer(request, from_validation(error, request.headers.get("content-type", "")))


async def on_client_gone(_request: Request, _error: Exception) -> Response:
    """Nobody reads this; the status is for the log."""
    return Response(status_code=499)
