"""The requests that the API accepts, as far as they can be checked without knowing the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from services.gateway.errors import bad_request, parameter_name

MAX_STOP_STRINGS = 4
# Bounds what the gateway compares with each new piece of text.
MAX_STOP_CHARACTERS = 1000

# Parameters of OpenAI's API that would change the answer and that this server can't honour, each with the values that
# ask for nothing. Everything else that is unknown is ignored.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),  # of text completions; chat has it
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_UNSUPPORTED_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}


def _invalid(message: str) -> PydanticCustomError:
    # The message is a template to pydantic, and braces may come from the client.
    return PydanticCustomError("invalid_value", "{reason}", {"reason": message})


def _join_parts(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _invalid(f"part {i} is of type {kind!r}, and this model reads text parts only")
        if not isinstance(part.get("text"), str):
            raise _invalid(f"part {i} has no text")
        texts.append(part["text"])
    return "\n".join(texts)


def _list_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        return value if value is None else _refuse("use a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        return _refuse(f"at most {MAX_STOP_STRINGS} stop strings are possible")
    if "" in stops:
        return _refuse("a stop string can't be empty")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        return _refuse(f"a stop string can have at most {MAX_STOP_CHARACTERS} characters")
    return stops


def _refuse(message: str) -> Any:
    raise _invalid(message)


def _list_prompts(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(_is_id(item) for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and item and all(_is_id(i) for i in item) for item in value):
            return value
    return _refuse("use a string, a list of strings, a list of token ids or a list of such lists, none of them empty")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_TEXT_OR_PARTS = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
_STRING_OR_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]}
_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        _IDS,
        {"type": "array", "items": _IDS},
    ]
}

Content = Annotated[str | None, BeforeValidator(_join_parts), WithJsonSchema(_TEXT_OR_PARTS)]
Stops = Annotated[list[str] | None, BeforeValidator(_list_stops), WithJsonSchema(_STRING_OR_STRINGS)]
Prompts = Annotated[list[str] | list[list[int]], BeforeValidator(_list_prompts), WithJsonSchema(_PROMPTS)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class ToolEvent(_Model):
    """A run of the Python tool inside an assistant's message: the call, or its result."""

    type: Literal["call", "result"]
    call_index: int = Field(ge=0, description="counts the calls of the message from 0")
    code: str | None = Field(None, description="call: what was run")
    offset: int | None = Field(
        None, ge=0, description="call: number of characters (Unicode code points) of `content` that precede it"
    )
    status: str | None = Field(None, description="result: `ok`, or what went wrong")
    output: str | None = Field(None, description="result: what the model read")
    duration_seconds: float | None = Field(None, description="result: how long the code ran")

    @model_validator(mode="after")
    def _complete(self) -> ToolEvent:
        if self.type == "call" and (self.code is None or self.offset is None):
            raise _invalid("a call needs code and offset")
        if self.type == "result" and self.output is None:
            raise _invalid("a result needs output")
        return self


class Extension(_Model):
    """What this server adds to OpenAI's format."""

    tool_events: list[ToolEvent] = Field(default_factory=list)


class ChatMessage(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    nanochat: Extension | None = Field(
        None, description="the same object that came with an assistant's answer, so that the model sees its tool calls"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ChatMessage:
        if self.role != "assistant":
            if self.content is None:
                raise _invalid(f"a {self.role} message needs content")
            if self.nanochat is not None and self.nanochat.tool_events:
                raise _invalid("only assistant messages have tool events")
        elif self.content is None and self.nanochat is None and not self.model_extra:
            raise _invalid("an assistant message needs content")
        return self


class StreamOptions(_Model):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="send a last chunk with the token counts")


class JsonSchemaFormat(_Model):
    """A JSON schema for the answer, with its name."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="letters, digits, `_` and `-`, up to 64")
    description: str | None = Field(None, description="accepted and not used")
    schema_: dict[str, Any] = Field(alias="schema", description="what the answer is, as a JSON schema")
    strict: bool | None = Field(None, description="accepted; the answer always follows the schema")


class ResponseFormat(_Model):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise bad_request(
                "Missing required parameter: response_format.json_schema.",
                "response_format.json_schema",
                "missing_required_parameter",
            )
        return self


class SamplingRequest(_Model):
    """What chat and text completions have in common."""

    model: str | None = Field(None, description="a name from `/v1/models`; may be left out while one model is served")
    stream: bool | None = Field(None, description="send the answer as server-sent events while it is written")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, description="number of independent answers")
    max_tokens: int | None = Field(None, ge=1, description="most tokens of the answer, tool output included")
    stop: Stops = Field(None, description="up to 4 strings; the answer ends before the first one that appears")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1, description="sample from the likeliest tokens of this total weight")
    top_k: int | None = Field(None, ge=-1, description="sample from so many of the likeliest tokens; 0 or -1 is all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="leave out tokens less likely than this share of the likeliest one"
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**64, description="the same seed and request give the same answer again"
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="against tokens that have appeared")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="against tokens, each time they appear")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10, description="divides the logits of tokens that have appeared; 1 is none"
    )
    logit_bias: dict[str, float] | None = Field(None, description="token id to a number from -100 to 100")
    regex: str | None = Field(None, min_length=1, description="a regular expression that the whole answer matches")
    user: str | None = Field(None, description="accepted and not used")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(SamplingRequest):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "messages": [{"role": "user", "content": "What is 1234 * 5678?"}],
                "temperature": 0.6,
                "stream": True,
            }
        }
    )

    messages: list[ChatMessage] = Field(min_length=1)
    response_format: ResponseFormat | None = Field(None, description="make the answer JSON; turns the Python tool off")
    max_completion_tokens: int | None = Field(None, ge=1, description="newer name of `max_tokens`; wins over it")
    logprobs: bool | None = Field(None, description="report the log probability of each token of the text")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="and so many of the likeliest alternatives")

    @model_validator(mode="after")
    def _one_constraint(self) -> ChatRequest:
        if self.regex is not None and self.response_format is not None and self.response_format.type != "text":
            raise bad_request("Give either response_format or regex.", "regex", "invalid_value")
        return self

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs", "invalid_value")
        return self


class CompletionRequest(SamplingRequest):
    """Body of `POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0.6}}
    )

    prompt: Prompts
    logprobs: int | None = Field(
        None, ge=0, le=20, description="report each token's log probability and so many of the likeliest alternatives"
    )


class TokenizeRequest(_Model):
    """Body of `POST /tokenize`."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Hello there"}})

    model: str | None = None
    prompt: str | None = Field(None, description="text to encode")
    messages: list[ChatMessage] | None = Field(None, min_length=1, description="or a conversation, as chat sends it")
    add_special_tokens: bool | None = Field(None, description="begin a prompt with the token that begins documents")
    return_token_strs: bool | None = Field(None, description="also give the text of each token")

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("Give either prompt or messages.", "prompt", "invalid_value")
        return self


class DetokenizeRequest(_Model):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"example": {"tokens": [72, 105]}})

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def refuse_unsupported(request: SamplingRequest) -> None:
    """
    Raises:
        ApiError: 400 naming a parameter that asks for something this server can't do.
    """
    _refuse_extra(request.model_extra, _UNSUPPORTED, ())
    if isinstance(request, ChatRequest):
        refuse_unsupported_messages(request.messages)


def refuse_unsupported_messages(messages: list[ChatMessage]) -> None:
    """:func:`refuse_unsupported` of the messages alone."""
    for i, message in enumerate(messages):
        _refuse_extra(message.model_extra, _UNSUPPORTED_IN_MESSAGE, ("messages", i))


def _refuse_extra(
    extra: Mapping[str, Any] | None, unsupported: Mapping[str, tuple[Any, ...]], location: tuple[str | int, ...]
) -> None:
    for name, value in (extra or {}).items():
        if name in unsupported and value is not None and value not in unsupported[name]:
            param = parameter_name((*location, name))
            raise bad_request(f"{param} is not supported by this server.", param, "unsupported_parameter")
