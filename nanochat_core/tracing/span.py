"""One service's part of a request, and the headers that connect the parts.

The trace follows W3C Trace Context (https://www.w3.org/TR/trace-context/): the header ``traceparent`` carries the
trace's id, the caller's span and the flag "sampled". ``tracestate`` is passed on; it is dropped if it is longer than
512 characters or not printable ASCII, and API keys in it are redacted.
"""

import contextvars
import dataclasses
import random
import re
import uuid
from collections.abc import Mapping
from typing import Any

from nanochat_core.redaction import redact

REQUEST_ID, TRACEPARENT, TRACESTATE = "x-request-id", "traceparent", "tracestate"
"""Names of the headers, in HTTP and in gRPC's metadata."""

_MAX_REQUEST_ID_CHARACTERS, _MAX_TRACESTATE_CHARACTERS = 128, 512
# An id of only zeros is invalid, and so is version ff. Versions after 00 may append fields, which this code ignores.
_TRACEPARENT_FORM = re.compile(
    r"((?!ff)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_SAMPLED = 0x01


@dataclasses.dataclass
class Span:
    """One service's part of a request.

    Attributes:
        name: name of the operation, such as the route.
        request_id: the request's id, the same in all services.
        trace_id: 32 hexadecimal digits, the same in all services.
        sampled: whether the services export the trace; None if that is not decided yet.
        parent_id: 16 hexadecimal digits of the caller's span; empty if the trace begins in this service.
        tracestate: header of other tracing systems, which is passed on.
        span_id: 16 hexadecimal digits.
        attributes: values by name that are exported with the span.
        error: why the request failed; empty if it did not fail.
    """

    name: str
    request_id: str
    trace_id: str
    sampled: bool | None = None
    parent_id: str = ""
    tracestate: str = ""
    span_id: str = dataclasses.field(default_factory=lambda: _random_id(16))
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""

    @classmethod
    def from_headers(cls, name: str, headers: Mapping[str, str]) -> "Span":
        """A child of the caller's span, or the first span of a new trace if the caller sent no valid ``traceparent``.

        A request id is generated if the caller sent no id, or an id that is too long or not safe to log. The keys of
        ``headers`` are in lower case.
        """
        request_id = _request_id(headers.get(REQUEST_ID, ""))
        parent = _TRACEPARENT_FORM.fullmatch(headers.get(TRACEPARENT, "").strip())
        if not parent or (parent[1] == "00" and parent[5]):
            return cls(name, request_id, _random_id(32))
        state = headers.get(TRACESTATE, "")
        return cls(
            name,
            request_id,
            parent[2],
            sampled=bool(int(parent[4], 16) & _SAMPLED),
            parent_id=parent[3],
            tracestate=redact(state) if len(state) <= _MAX_TRACESTATE_CHARACTERS and _is_printable(state) else "",
        )

    def headers(self) -> dict[str, str]:
        """The headers for calls to the next service, whose spans will be children of this one."""
        flags = _SAMPLED if self.sampled else 0
        headers = {REQUEST_ID: self.request_id, TRACEPARENT: f"00-{self.trace_id}-{self.span_id}-{flags:02x}"}
        return headers | ({TRACESTATE: self.tracestate} if self.tracestate else {})

    def log_fields(self) -> dict[str, str]:
        """The fields that each log line of the request gets."""
        return {"request_id": self.request_id, "trace_id": self.trace_id, "span_id": self.span_id}


current_span: contextvars.ContextVar[Span | None] = contextvars.ContextVar("current_span", default=None)
"""The span that the current task belongs to. A task belongs to the span of the task that created it."""


def _request_id(given: str) -> str:
    if 0 < len(given) <= _MAX_REQUEST_ID_CHARACTERS and _is_printable(given) and given == given.strip():
        return redact(given)  # the id goes into logs and traces, so an API key in it is redacted
    return uuid.uuid4().hex


def _is_printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _random_id(digits: int) -> str:
    """Hexadecimal digits that are not all zero."""
    return f"{random.randrange(1, 16**digits):0{digits}x}"  # noqa: S311 - the id is not a secret
