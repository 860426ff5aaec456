"""Structured logs on stderr: each event is one JSON object on one line, or readable text if stderr is a terminal."""

import json
import logging
import math
import re
import sys
import time
from typing import Any

from nanochat_core.redaction import redact
from nanochat_core.tracing.span import current_span

# Moves the cursor of a terminal to the beginning of its line, and erases the line.
CLEAR_LINE = "\r\x1b[K"

# Control characters that a terminal may obey. Newline and tab are not among them, because they are harmless.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object, with the values of ``extra`` as further fields.

    Events of a task that serves a request also have the request's id and trace. API keys are redacted everywhere.
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self.service,
            "event": record.getMessage(),
        }
        if span := current_span.get():
            event |= span.log_fields()
        event |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(_finite(event), default=str, ensure_ascii=False, allow_nan=False))


class TerminalFormatter(logging.Formatter):
    """Formats a record as one line for a person: ``warning: step skipped  step 3  loss nan``.

    Spaces replace the underscores in the names of fields. Lists of strings, such as commands to run next, are written
    below, one string per line. The text first clears the current line of the terminal, where a progress bar may be.
    Control characters are escaped, because a client may have sent them and the terminal would obey them.
    """

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        facts, below = [level + record.getMessage()], []
        for key, value in vars(record).items():
            if key in _STANDARD:
                continue
            name = key.replace("_", " ")
            if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
                below += [f"  {name}: {entry}" for entry in value]
            else:
                text = json.dumps(_finite(value), default=str, ensure_ascii=False)
                facts.append(f"{name} {text if isinstance(value, dict) or not str(value).isprintable() else value}")
        if record.exc_info:
            below.append(self.formatException(record.exc_info))
        shown = redact("\n".join(["  ".join(facts), *below]))
        return CLEAR_LINE + _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", shown)


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities replaced by strings, because JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def configure(service: str, level: str = "info") -> None:
    """Sends all logging of this process to stderr. A program calls this function once, when it starts.

    The lines are JSON, unless stderr is a terminal.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TerminalFormatter() if sys.stderr.isatty() else JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("httpx").setLevel(logging.WARNING)  # because httpx logs every request at level info
