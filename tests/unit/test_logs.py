"""Logs: every record becomes one line of JSON, for any content."""

import json
import logging
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.program import JobSettings, run_command
from nanochat_core import logs
from nanochat_core.logs import CLEAR_LINE, JsonFormatter, TerminalFormatter


def line(
    message: str = "started", *arguments: object, extra: dict[str, Any] | None = None, exc_info: Any = None
) -> str:
    logger = logging.Logger("example")
    record = logger.makeRecord("example", logging.WARNING, __file__, 1, message, arguments, exc_info, extra=extra)
    return JsonFormatter("engine").format(record)


def for_a_person(message: str, level: int = logging.INFO, exc_info: Any = None, **extra: Any) -> list[str]:
    record = logging.Logger("x").makeRecord("x", level, __file__, 1, message, (), exc_info, extra=extra)
    text = TerminalFormatter().format(record)
    assert text.startswith(CLEAR_LINE)
    return text.removeprefix(CLEAR_LINE).splitlines()


def test_a_person_at_a_terminal_reads_words_instead_of_json() -> None:
    assert for_a_person("training done", step=3, loss=1.5) == ["training done  step 3  loss 1.5"]
    assert for_a_person("step skipped", logging.WARNING, gradient_norm=math.nan) == [
        "warning: step skipped  gradient norm nan"
    ]
    assert for_a_person("mixture", shares={"a": 0.5}) == ['mixture  shares {"a": 0.5}']


def test_a_person_sees_no_secret_and_no_command_for_the_terminal() -> None:
    key = f"nc-{'0a' * 6}-{'5f' * 24}"
    assert for_a_person("asked\x1b[2J", key=key, path="/\nwarning: \x9b2J") == [
        'asked\\x1b[2J  key nc-0a0a0a0a0a0a-***  path "/\\nwarning: \\x9b2J"'
    ]


def test_a_person_finds_commands_on_lines_of_their_own() -> None:
    assert for_a_person("done", step=1, next=["make run", "make test"]) == [
        "done  step 1",
        "  next: make run",
        "  next: make test",
    ]


def test_a_person_sees_where_an_unexpected_error_arose() -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        lines = for_a_person("failed", logging.ERROR, sys.exc_info())
    assert (lines[0], lines[1], lines[-1]) == (
        "error: failed",
        "Traceback (most recent call last):",
        "RuntimeError: broken",
    )


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def event(*arguments: Any, **options: Any) -> dict[str, Any]:
    return json.loads(line(*arguments, **options), parse_constant=refuse)


def test_a_record_has_time_level_service_and_event() -> None:
    got = event("step %d of %s", 3, "many")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", got.pop("time"))
    assert got == {"level": "warning", "service": "engine", "event": "step 3 of many"}


def test_the_time_is_in_utc_with_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.makeLogRecord({"created": 86400.25, "msecs": 250.0})
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        shown = json.loads(JsonFormatter("x").format(record))["time"]
    time.tzset()
    assert shown == "1970-01-02T00:00:00.250Z"


def test_extra_becomes_fields() -> None:
    got = event(extra={"tokens": 3, "ok": True, "nested": {"a": [1, None]}, "path": Path("/x")})
    assert (got["tokens"], got["ok"], got["nested"], got["path"]) == (3, True, {"a": [1, None]}, "/x")


def test_numbers_that_json_lacks_become_text() -> None:
    got = event(extra={"loss": math.nan, "many": {"bpb": [math.inf, -math.inf, 1.5]}, "pair": (math.nan, 2)})
    assert (got["loss"], got["many"], got["pair"]) == ("nan", {"bpb": ["inf", "-inf", 1.5]}, ["nan", 2])


def test_a_record_is_one_line_whatever_is_in_it() -> None:
    text = "two\nlines\r, \u2028 and 🦊 \x00"
    whole = line(text, extra={"field": text})
    assert "\n" not in whole
    assert "\r" not in whole
    assert "🦊" in whole
    assert (json.loads(whole)["event"], json.loads(whole)["field"]) == (text, text)


def test_an_exception_s_traceback_is_a_field() -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        got = event(exc_info=sys.exc_info())
    assert got["exception"].startswith("Traceback")
    assert got["exception"].endswith("RuntimeError: broken")


@pytest.mark.parametrize(("level", "seen"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_a_configured_process_logs_to_stderr_from_its_level_on(level: str, seen: int) -> None:
    code = f"""
import logging
from nanochat_core import logs
logging.basicConfig()  # a library may have called this before
logs.configure("sandbox", {level!r})
for level in ("debug", "info", "warning", "error"):
    getattr(logging.getLogger("some.library"), level)("event", extra={{"given": level}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    given = [json.loads(line)["given"] for line in done.stderr.splitlines()]
    assert given == ["debug", "info", "warning", "error"][4 - seen :]


@pytest.mark.parametrize(
    ("environment", "configured"),
    [
        ({}, ("core", "info")),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ("core", "info")),
        ({"WORLD_SIZE": "2", "RANK": "1"}, ("core-1", "warning")),
        ({"WORLD_SIZE": "1", "RANK": "1"}, ("core", "info")),
    ],
)
def test_only_the_first_rank_of_a_job_logs_everything(
    environment: dict[str, str], configured: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr("jobs.program.logs.configure", lambda *given: seen.append(given))
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run_command("jobs.eval.core", "core", JobSettings, lambda _: None, [])
    assert seen == [configured]


@pytest.mark.parametrize("turn", ["first", "second"])
def test_a_program_that_a_test_runs_does_not_log_in_later_tests(turn: str) -> None:
    assert not [handler for handler in logging.getLogger().handlers if isinstance(handler.formatter, JsonFormatter)]
    logs.configure(turn)
