"""The model's Python tool in process: the same sandbox that the service runs."""

from __future__ import annotations

from nanochat_core.chat import tool_output_text
from nanochat_core.engine import ToolOutput
from nanochat_core.sandbox import ExecutionResult, Limits, ResultFormat, SandboxExecutor


class SandboxTool:
    """A :class:`~nanochat_core.engine.ToolRunner` around an executor."""

    def __init__(self, executor: SandboxExecutor) -> None:
        self._executor = executor

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:  # noqa: ARG002
        result: ExecutionResult = await self._executor.execute(
            code, Limits(wall_seconds=timeout_seconds), ResultFormat.STR
        )
        return ToolOutput(result.status.value, tool_output_text(result.result, result.stdout, result.error))
