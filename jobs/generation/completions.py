"""Turns the tokens that an engine generated into the answer that a person reads."""

from jobs.tasks.task import Response
from nanochat_core.chat import AssistantStream
from nanochat_core.engine import Completion, ToolCall, ToolResult
from nanochat_core.tokenizer import Tokenizer


def read_completion(tokenizer: Tokenizer, completion: Completion) -> Response:
    """The text of a completion, and the code and output of each tool call that has ended."""
    stream = AssistantStream(tokenizer)
    parts = [part for token in completion.token_ids for part in stream.push(token)] + stream.finish()
    codes = [event.code for event in completion.tool_events if isinstance(event, ToolCall)]
    outputs = [event.output for event in completion.tool_events if isinstance(event, ToolResult)]
    # The last call has no output if the answer ended first.
    calls = tuple(zip(codes, outputs, strict=False))
    return Response("".join(part.text for part in parts if part.type == "text"), calls)
