"""Runs an engine's Python tool in this process, and turns completions into the answers that a person reads."""

from jobs.tasks.task import Response
from nanochat_core.chat import AssistantStream, tool_output_text
from nanochat_core.engine import Completion, ToolCall, ToolOutput, ToolResult
from nanochat_core.sandbox import Limits, ResultFormat, SandboxExecutor
from nanochat_core.tokenizer import Tokenizer


class SandboxTool:
    """A :class:`~nanochat_core.engine.ToolRunner` that runs an engine's tool calls in a sandbox of this process.

    The sandbox service uses the same sandbox code.
    """

    def __init__(self, executor: SandboxExecutor) -> None:
        self._executor = executor

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:  # noqa: ARG002
        result = await self._executor.execute(code, Limits(wall_seconds=timeout_seconds), ResultFormat.STR)
        return ToolOutput(result.status.value, tool_output_text(result.result, result.stdout, result.error))


def read_completion(tokenizer: Tokenizer, completion: Completion) -> Response:
    """The text of a completion, and the code and output of each finished tool call."""
    stream = AssistantStream(tokenizer)
    parts = [part for token in completion.token_ids for part in stream.push(token)] + stream.finish()
    codes = [event.code for event in completion.tool_events if isinstance(event, ToolCall)]
    outputs = [event.output for event in completion.tool_events if isinstance(event, ToolResult)]
    # The last call has no output if the answer ended first.
    calls = tuple(zip(codes, outputs, strict=False))
    return Response("".join(part.text for part in parts if part.type == "text"), calls)
