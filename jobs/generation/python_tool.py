"""The model's Python tool in the same process, with the sandbox that the sandbox service runs."""

from nanochat_core.chat import tool_output_text
from nanochat_core.engine import ToolOutput
from nanochat_core.sandbox import ExecutionResult, Limits, ResultFormat, SandboxExecutor


class SandboxTool:
    """Runs an engine's tool calls in a sandbox; a :class:`~nanochat_core.engine.ToolRunner`."""

    def __init__(self, executor: SandboxExecutor) -> None:
        self._executor = executor

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:  # noqa: ARG002
        result: ExecutionResult = await self._executor.execute(
            code, Limits(wall_seconds=timeout_seconds), ResultFormat.STR
        )
        return ToolOutput(result.status.value, tool_output_text(result.result, result.stdout, result.error))
