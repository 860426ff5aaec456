"""A request keeps its id and its trace from service to service, in headers and in log lines."""

import json
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core.errors import UserError
from nanochat_core.logs import JsonFormatter
from nanochat_core.tracing.span import Span, current_span
from nanochat_core.tracing.tracer import Tracer, TracingSettings

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(autouse=True)
def _outside_of_requests() -> Iterator[None]:
    yield
    current_span.set(None)


def hexadecimal(digits: int) -> st.SearchStrategy[str]:
    return st.text("0123456789abcdef", min_size=digits, max_size=digits)


@given(trace=hexadecimal(32), parent=hexadecimal(16), flags=hexadecimal(2))
def test_a_valid_traceparent_is_continued_under_a_new_span(trace: str, parent: str, flags: str) -> None:
    span = Span.from_headers("GET", {"traceparent": f"00-{trace}-{parent}-{flags}"})
    if not trace.strip("0") or not parent.strip("0"):
        assert span.parent_id == ""
        return
    assert (span.trace_id, span.parent_id) == (trace, parent)
    assert span.span_id != parent
    assert span.sampled == bool(int(flags, 16) & 1)
    below = Span.from_headers("Generate", span.headers())
    assert (below.trace_id, below.parent_id, below.sampled) == (trace, span.span_id, span.sampled)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        VALID.upper(),
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{PARENT}",
        f"{VALID}-more",
        f"{VALID}\n{VALID}",
    ],
)
def test_an_invalid_traceparent_begins_a_new_trace_without_the_state(header: str) -> None:
    span = Span.from_headers("GET", {"traceparent": header, "tracestate": "vendor=1"})
    assert re.fullmatch("[0-9a-f]{32}", span.trace_id)
    assert span.trace_id != TRACE
    assert (span.parent_id, span.tracestate, span.sampled) == ("", "", None)


def test_a_later_version_may_have_more_fields() -> None:
    assert Span.from_headers("GET", {"traceparent": f"01-{TRACE}-{PARENT}-01-more"}).trace_id == TRACE


def test_the_state_and_the_request_id_are_passed_on() -> None:
    headers = {"traceparent": VALID, "tracestate": "a=1,b=2", "x-request-id": "abc-123"}
    passed = Span.from_headers("GET", headers).headers()
    assert (passed["tracestate"], passed["x-request-id"]) == ("a=1,b=2", "abc-123")
    assert passed["traceparent"].startswith(f"00-{TRACE}-")


@pytest.mark.parametrize("bad", ["", "x" * 129, "tab\there", " padded", "line\nbreak", "é"])
def test_an_unusable_request_id_is_replaced(bad: str) -> None:
    assert re.fullmatch("[0-9a-f]{32}", Span.from_headers("GET", {"x-request-id": bad}).request_id)


def test_log_lines_of_a_request_have_its_ids_and_others_do_not() -> None:
    def line() -> dict[str, str]:
        record = logging.makeLogRecord({"msg": "event"})
        parsed: dict[str, str] = json.loads(JsonFormatter("engine").format(record))
        return parsed

    assert "trace_id" not in line()
    with Tracer("engine", TracingSettings()).request("GET", {"traceparent": VALID, "x-request-id": "abc"}) as span:
        assert {name: line()[name] for name in ("request_id", "trace_id", "span_id")} == {
            "request_id": "abc",
            "trace_id": TRACE,
            "span_id": span.span_id,
        }


def test_without_a_collector_a_new_trace_is_not_sampled_and_a_callers_choice_is_passed_on() -> None:
    tracer = Tracer("engine", TracingSettings())
    with tracer.request("GET", {}) as span:
        assert span.headers()["traceparent"].endswith("-00")
    with tracer.request("GET", {"traceparent": VALID}) as span:
        assert span.headers()["traceparent"].endswith("-01")


def test_missing_packages_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nanochat_core.tracing.otlp", None)
    with pytest.raises(UserError, match=r"nanochat\[tracing\]"):
        Tracer("engine", TracingSettings(otlp_endpoint="http://127.0.0.1:4318"))
