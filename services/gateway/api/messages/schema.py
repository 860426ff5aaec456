"""The request body of the Messages API, and its conversion to the model's turns of user and assistant."""

import functools
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from nanochat_core.chat import Message, Part
from services.gateway.engines.request import Turns, call_text
from services.gateway.errors import bad_request, invalid_value, shown
from services.gateway.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    ApiModel,
    ChatParameters,
    FunctionCall,
    FunctionDefinition,
    FunctionTool,
    Integer,
    NamedFunction,
    NamedTool,
    Stops,
    refuse,
)

# Unsupported parameters that would change the answer. The listed values of a parameter change nothing, so they are
# accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "mcp_servers": ([],),
    "output_config": ({},),
    "thinking": ({"type": "disabled"},),
}
# Name of the model's own Python tool in answers. Clients know this name, because Anthropic's server uses it for its own
# Python tool.
PYTHON_TOOL = "code_execution"


def _list_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Block(ApiModel):
    """A part of a message: text, a call, the result of a call, or a thinking block, which is left out of the prompt."""

    type: Literal[
        "text",
        "tool_use",
        "tool_result",
        "server_tool_use",
        "code_execution_tool_result",
        "thinking",
        "redacted_thinking",
    ]
    text: str = Field("", description="text: the text of the block")
    id: str = Field("", description="tool_use: id of the call")
    name: str = Field("", description="tool_use: name of the called function")
    input: dict[str, Any] = Field(default_factory=dict, description="tool_use: the arguments")
    tool_use_id: str = Field("", description="tool_result: id of the call")
    content: Any = Field(None, description="tool_result: a text or text blocks")

    @property
    def result(self) -> str:
        """The text of a result. Raises an :class:`ApiError` with status 400 if the result is not text."""
        if isinstance(self.content, dict):  # a result of the Python tool
            return str(self.content.get("stdout", ""))
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        parts = self.content if isinstance(self.content, list) else [None]
        texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise invalid_value("A tool_result has a part that is not text; this model reads only text.", "messages")
        return "\n".join(map(str, texts))


Blocks = Annotated[
    list[Block],
    Field(max_length=MAX_PARTS, fail_fast=True),
    BeforeValidator(_list_blocks, json_schema_input_type=str | list[Block]),
]


class InputMessage(ApiModel):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: Blocks


class Tool(ApiModel):
    """A function of the client."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="JSON schema of the arguments")


class ToolChoice(ApiModel):
    """Says whether the answer must be a call, and names the function to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="tool: the function's name")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise bad_request("tool_choice needs name.", "tool_choice.name", "missing_required_parameter")
        return self


class MessagesRequest(ApiModel):
    """Body of `POST /v1/messages`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"max_tokens": 256, "messages": [{"role": "user", "content": "What is 1234 * 5678?"}]}
        }
    )

    model: str | None = Field(None, description="a name from `/v1/models`; optional while one model is served")
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Blocks | None = Field(None, description="instructions before the conversation")
    max_tokens: Integer = Field(ge=1, description="maximum number of tokens of the answer")
    stop_sequences: Stops = Field(None, description="up to 4 texts; the answer ends before the first one that appears")
    stream: bool | None = Field(None, description="send the answer as server-sent events while it is written")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always selects the likeliest token")
    top_p: float | None = Field(
        None, ge=0, le=1, description="sample from the likeliest tokens with this total probability"
    )
    top_k: Integer | None = Field(None, ge=-1, description="sample from this many likeliest tokens")
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: ToolChoice | None = None
    metadata: dict[str, Any] | None = Field(None, description="accepted and not used")

    @model_validator(mode="after")
    def _supported(self) -> Self:
        refuse(self, UNSUPPORTED)
        self.parameters.check()
        return self

    @functools.cached_property
    def parameters(self) -> ChatParameters:
        """The request's parameters in the form of chat completions."""
        tools = [
            FunctionTool(
                type="function",
                function=FunctionDefinition(
                    name=tool.name, description=tool.description, parameters=tool.input_schema, strict=True
                ),
            )
            for tool in self.tools or ()
        ]
        return ChatParameters.model_validate(
            {
                "model": self.model,
                "stream": self.stream,
                "max_tokens": self.max_tokens,
                "stop": self.stop_sequences,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "tools": tools or None,
                "tool_choice": self._choice(),
            }
        )

    def _choice(self) -> str | NamedTool | None:
        if self.tool_choice is None:
            return None
        if self.tool_choice.type == "tool":
            return NamedTool(function=NamedFunction(name=self.tool_choice.name or ""))
        return "required" if self.tool_choice.type == "any" else self.tool_choice.type

    def turns(self, tools: Sequence[FunctionTool]) -> list[Message]:
        """Returns the conversation as the model's turns.

        Raises an :class:`ApiError` with status 400 if a result has no call before it or is not text, if a user's
        message contains a block that only the assistant may write, or if there is nothing that the model can read.
        """
        turns = Turns(["\n".join(block.text for block in self.system)] if self.system else [], tools)
        for i, message in enumerate(self.messages):
            if message.role == "assistant":
                parts: list[Part] = []
                for block in message.content:
                    if block.type == "tool_use":
                        turns.called(block.id, block.name)
                        parts += [Part("text", "\n\n")] if parts else []
                    parts += _parts(block)
                turns.answer(tuple(parts) or (Part("text", ""),))
                continue
            for block in message.content:
                if block.type == "tool_result":
                    turns.result(block.tool_use_id, block.result, f"messages[{i}].content")
                elif block.type == "text":
                    turns.ask("user", block.text)
                else:
                    kind = shown(block.type)
                    raise invalid_value(f"A user's message cannot contain a {kind} block.", f"messages[{i}].content")
        return turns.finish()


def _parts(block: Block) -> tuple[Part, ...]:
    """Returns the parts of the model's turn that represent a block of the assistant.

    The result is empty for a block that the model does not read, such as a ``thinking`` block.
    """
    match block.type:
        case "text":
            return (Part("text", block.text),)
        case "tool_use":
            return (Part("text", call_text(FunctionCall(name=block.name, arguments=json.dumps(block.input)))),)
        case "server_tool_use":
            return (Part("python", str(block.input.get("code", ""))),)
        case "code_execution_tool_result":
            return (Part("python_output", block.result),)
    return ()
