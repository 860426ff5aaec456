"""The request body of the Responses API."""

import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from services.gateway.errors import bad_request, invalid_value
from services.gateway.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    ApiModel,
    ChatParameters,
    FunctionDefinition,
    FunctionTool,
    Integer,
    JsonSchemaFormat,
    ResponseFormat,
    ToolChoice,
    refuse,
)

# Unsupported parameters that would change the answer. The listed values of a parameter change nothing, so they are
# accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
}
_TEXT_PARTS = ("input_text", "output_text", "text")


def _join_parts(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) > MAX_PARTS:
        raise invalid_value(f"An item of input has more than {MAX_PARTS} parts.", "input")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise invalid_value(f"Part {i} of input is not text; this model reads only text.", "input")
        texts.append(part["text"])
    return "\n".join(texts)


Text = Annotated[str | None, BeforeValidator(_join_parts, json_schema_input_type=str | list[dict[str, Any]])]


def _list_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _nested_choice(value: Any) -> Any:
    """Converts ``{"type": "function", "name": ...}`` to the form of chat completions, with the name in an object."""
    if isinstance(value, dict) and "function" not in value:
        return {"type": value.get("type"), "function": {"name": value.get("name")}}
    return value


class InputItem(ApiModel):
    """A message, a call, the result of a call, or a reference to an item of an earlier response. An item of an earlier
    response's `output` is accepted too. A `reasoning` item is left out of the prompt."""

    type: Literal[
        "message", "function_call", "function_call_output", "code_interpreter_call", "reasoning", "item_reference"
    ] = "message"
    id: str | None = Field(None, description="item_reference: the id of an item of an earlier output")
    role: Literal["system", "developer", "user", "assistant"] | None = Field(None, description="message: its author")
    content: Text = Field(None, description="message: its text")
    call_id: str | None = Field(None, description="function_call, function_call_output: id of the call")
    name: str | None = Field(None, description="function_call: name of the function")
    arguments: str | None = Field(None, description="function_call: the arguments as JSON")
    output: Text = Field(None, description="function_call_output: the result that the model reads")
    code: str | None = Field(None, description="code_interpreter_call: the Python code")
    outputs: list[dict[str, Any]] | None = Field(
        None, max_length=MAX_PARTS, fail_fast=True, description="code_interpreter_call: the output of the code"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "code_interpreter_call": ("code",),
            "item_reference": ("id",),
        }
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise bad_request(f"An item of type {self.type} needs {name}.", "input", "missing_required_parameter")
        return self


class TextFormat(ApiModel):
    """The form of the answer. Its fields are those of chat completions' `response_format`, without the inner object."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = Field("answer", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="letters, digits, `_` and `-`, up to 64")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def response_format(self) -> ResponseFormat:
        """Returns the format in the form of chat completions.

        Raises an :class:`ApiError` with status 400 if the type is ``json_schema`` and there is no schema.
        """
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        if self.schema_ is None:
            param = "text.format.schema"
            raise bad_request(f"Missing required parameter: {param}.", param, "missing_required_parameter")
        inner = JsonSchemaFormat(name=self.name, description=self.description, schema=self.schema_, strict=self.strict)
        return ResponseFormat(type=self.type, json_schema=inner)


class TextConfig(ApiModel):
    """The parameter `text`, whose field `format` is the form of the answer."""

    format: TextFormat | None = None


class Tool(FunctionDefinition):
    """A function of the client, or `code_interpreter`, the model's own Python tool."""

    type: Literal["function", "code_interpreter"]
    name: str = Field("", pattern=r"^[A-Za-z0-9_-]{0,64}$", description="function: letters, digits, `_` and `-`")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.type == "function" and not self.name:
            raise bad_request("A function in tools needs a name.", "tools", "missing_required_parameter")
        return self


class StreamOptions(ApiModel):
    """Options of a streamed response. They are accepted and not used."""

    include_obfuscation: bool | None = None


class ResponsesRequest(ApiModel):
    """Body of `POST /v1/responses`."""

    model_config = ConfigDict(json_schema_extra={"example": {"input": "What is 1234 * 5678?", "stream": True}})

    model: str | None = Field(None, description="a name from `/v1/models`; optional while one model is served")
    input: Annotated[list[InputItem], BeforeValidator(_list_items, json_schema_input_type=str | list[InputItem])] = (
        Field(
            min_length=1,
            max_length=MAX_MESSAGES,
            fail_fast=True,
            description="a user's message, or a list of messages, calls and results",
        )
    )
    instructions: str | None = Field(None, description="a system message for this response only")
    previous_response_id: str | None = Field(
        None, description="continue the conversation of a response that this server keeps"
    )
    stream: bool | None = Field(None, description="send the answer as server-sent events while it is written")
    stream_options: StreamOptions | None = None
    max_output_tokens: Integer | None = Field(None, ge=1, description="maximum number of tokens of the answer")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always selects the likeliest token")
    top_p: float | None = Field(
        None, ge=0, le=1, description="sample from the likeliest tokens with this total probability"
    )
    top_logprobs: Integer | None = Field(
        None, ge=0, le=20, description="number of likeliest alternatives to report for each token"
    )
    include: list[str] | None = Field(
        None,
        max_length=20,
        description="`message.output_text.logprobs` reports log probabilities; other values change nothing",
    )
    text: TextConfig | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Annotated[ToolChoice, BeforeValidator(_nested_choice)] = Field(
        None, description="as in `/v1/chat/completions`, but without an inner object for the function"
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="`auto` leaves out the oldest messages if the conversation is longer than the context"
    )
    store: bool | None = Field(None, description="keep the response for later requests, if this server keeps responses")
    metadata: dict[str, str] | None = Field(None, description="returned unchanged")
    seed: Integer | None = Field(
        None,
        ge=-(2**63),
        lt=2**64,
        description="equal requests with equal seeds get equal answers from the same model revision, except for "
        "rounding on GPUs",
    )
    user: str | None = Field(None, description="accepted and not used")

    @model_validator(mode="after")
    def _supported(self) -> Self:
        refuse(self, UNSUPPORTED)
        self.parameters.check()
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the request asks for the log probabilities of the text."""
        return "message.output_text.logprobs" in (self.include or ())

    @functools.cached_property
    def parameters(self) -> ChatParameters:
        """The request's parameters in the form of chat completions."""
        return ChatParameters.model_validate(
            {
                "model": self.model,
                "stream": self.stream,
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "seed": self.seed,
                "logprobs": self.wants_logprobs,
                "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
                "response_format": self.text.format.response_format() if self.text and self.text.format else None,
                "tools": list(self._functions()) or None,
                "tool_choice": self.tool_choice,
                "truncation": self.truncation,
            }
        )

    def _functions(self) -> Iterator[FunctionTool]:
        for tool in self.tools or ():
            if tool.type == "function":
                described = FunctionDefinition(
                    name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
                )
                yield FunctionTool(type="function", function=described)
