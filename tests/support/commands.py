"""Runs command-line programs in tests, and checks an answer that used the Python tool."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
QUESTION = "What is 1234 * 5678?"
ANSWER = "7006652"
# The mark of slow tests on a cluster, which only make test-cluster-full runs.
ONLY_FULL = pytest.mark.skipif(not os.environ.get("NANOCHAT_TEST_FULL"), reason="NANOCHAT_TEST_FULL is not set")


def run(
    *command: str, stdin: str | None = None, environ: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's root. If the command fails, the test fails and shows its output."""
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
    """Check the answer to :data:`QUESTION`, a message of the REST API."""
    assert ANSWER in message["content"]
    call, result = message["nanochat"]["tool_events"]
    assert (call["type"], result["type"]) == ("call", "result")
    assert (result["status"], result["output"]) == ("ok", ANSWER)
