"""Converts the items of a Responses request to the model's turns of user and assistant."""

from collections.abc import Sequence

from nanochat_core.chat import Message, Part
from services.gateway.api.responses.schema import InputItem
from services.gateway.engines.request import Turns, call_text
from services.gateway.schemas import FunctionCall, FunctionTool


def turns_of(items: Sequence[InputItem], instructions: str | None, tools: Sequence[FunctionTool]) -> list[Message]:
    """Returns the turns of a prompt: first the instructions and the description of the tools, then the items.

    The texts before and after a Python call are one message, because the model called Python in the middle of that
    message.

    Raises an :class:`ApiError` with status 400 if a function's result has no call before it, or if there is nothing
    that the model can read.
    """
    turns = Turns([instructions] if instructions is not None else [], tools)
    in_call = False  # whether the previous item was a Python call, so that text after it belongs to the same message
    for i, item in enumerate(items):
        python = item.type == "code_interpreter_call"
        if python:
            turns.answer(_python_parts(item), joined=True)
        elif item.type == "function_call":
            call = FunctionCall(name=item.name or "", arguments=item.arguments or "")
            turns.called(item.call_id or "", call.name)
            turns.answer((Part("text", call_text(call)),))
        elif item.type == "function_call_output":
            turns.result(item.call_id or "", item.output or "", f"input[{i}].call_id")
        elif item.role == "assistant":
            turns.answer((Part("text", item.content or ""),), joined=in_call)
        elif item.type == "message":
            turns.ask(item.role or "user", item.content or "")
        in_call = python
    return turns.finish()


def _python_parts(item: InputItem) -> tuple[Part, ...]:
    logs = [output["logs"] for output in item.outputs or () if isinstance(output.get("logs"), str)]
    code = Part("python", item.code or "")
    return (code, Part("python_output", "\n".join(logs))) if logs else (code,)
