"""Running command-line programs in tests, and what a chat with a tool call must look like."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUESTION = "What is 1234 * 5678?"
ANSWER = "7006652"


def run(
    *command: str, stdin: str | None = None, environ: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The finished command, run in the project's root; fails the test with its whole output when it fails."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **(environ or {})},
        timeout=timeout,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def assert_answer_came_through_the_tool(message: Mapping[str, Any]) -> None:
    """``message`` is the assistant's answer to :data:`QUESTION` as the REST API gives it."""
    assert ANSWER in message["content"]
    call, result = message["nanochat"]["tool_events"]
    assert (call["type"], result["type"]) == ("call", "result")
    assert (result["status"], result["output"]) == ("ok", ANSWER)
