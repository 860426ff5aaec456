"""Request bodies of the API, with all checks that don't depend on the model."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from services.gateway.errors import bad_request, invalid_value

MAX_STOP_STRINGS = 4
# The gateway compares each new piece of text with the stop strings, so their length must have a bound.
MAX_STOP_CHARACTERS = 1000

# Parameters of OpenAI's API that this server doesn't support although they would change the answer. The listed values
# of a parameter change nothing, so they are accepted. The server ignores every other unknown parameter.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),  # only chat completions support the other types
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_UNSUPPORTED_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {"audio": (), "function_call": (), "tool_calls": ([],)}


def _reject(message: str) -> NoReturn:
    # pydantic reads the message as a template. The client's text may have braces, so it must be an argument of the
    # template.
    raise PydanticCustomError("invalid_value", "{reason}", {"reason": message})


def _join_parts(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            _reject(f"part {i} is of type {kind!r}, and this model reads text parts only")
        if not isinstance(part.get("text"), str):
            _reject(f"part {i} has no text")
        texts.append(part["text"])
    return "\n".join(texts)


def _list_stops(value: Any) -> Any:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        _reject("use a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        _reject(f"at most {MAX_STOP_STRINGS} stop strings are possible")
    if "" in stops:
        _reject("a stop string can't be empty")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        _reject(f"a stop string can have at most {MAX_STOP_CHARACTERS} characters")
    return stops


def _list_prompts(value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(item, str) for item in value) or all(map(_is_ids, value))):
        return value
    _reject("use a string, a list of strings, a list of token ids or a list of such lists, none of them empty")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


def _refuse(model: _Model, unsupported: Mapping[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Refuses fields that should change the answer but that the server would have to ignore."""
    for name, value in (model.model_extra or {}).items():
        if name in unsupported and value is not None and value not in unsupported[name]:
            param = f"{prefix}{name}"
            raise bad_request(f"{param} is not supported by this server.", param, "unsupported_parameter")


class TextPart(_Model):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[str | None, BeforeValidator(_join_parts, json_schema_input_type=str | list[TextPart])]
_StopList = Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)]
Stops = Annotated[list[str] | None, BeforeValidator(_list_stops, json_schema_input_type=str | _StopList)]
Prompts = Annotated[
    list[str] | list[list[int]],
    BeforeValidator(_list_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class ToolEvent(_Model):
    """A run of the Python tool inside an assistant's message: the call, or its result."""

    type: Literal["call", "result"]
    call_index: int = Field(ge=0, description="counts the calls of the message from 0")
    code: str | None = Field(None, description="call: the Python code that ran")
    offset: int | None = Field(
        None, ge=0, description="call: number of characters (Unicode code points) of `content` that precede it"
    )
    status: str | None = Field(None, description="result: `ok`, or the kind of failure")
    output: str | None = Field(None, description="result: the text that the model reads")
    duration_seconds: float | None = Field(None, description="result: how long the code ran")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "call" and (self.code is None or self.offset is None):
            _reject("a call needs code and offset")
        if self.type == "result" and self.output is None:
            _reject("a result needs output")
        return self


class Extension(_Model):
    """Fields that this server adds to OpenAI's format."""

    tool_events: list[ToolEvent] = Field(default_factory=list)


class ChatMessage(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    nanochat: Extension | None = Field(
        None, description="the same object that came with an assistant's answer, so that the model sees its tool calls"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.role != "assistant":
            if self.content is None:
                _reject(f"a {self.role} message needs content")
            if self.nanochat is not None and self.nanochat.tool_events:
                _reject("only assistant messages have tool events")
        elif self.content is None and self.nanochat is None and not self.model_extra:
            _reject("an assistant message needs content")
        return self


def _refuse_unsupported_messages(messages: Sequence[ChatMessage]) -> None:
    """Raises an :class:`ApiError` with status 400 for a message's field that this server doesn't support."""
    for i, message in enumerate(messages):
        _refuse(message, _UNSUPPORTED_IN_MESSAGE, f"messages[{i}].")


class StreamOptions(_Model):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="send a last chunk with the token counts")


class JsonSchemaFormat(_Model):
    """A JSON schema for the answer, with its name."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="letters, digits, `_` and `-`, up to 64")
    description: str | None = Field(None, description="accepted and not used")
    schema_: dict[str, Any] = Field(alias="schema", description="the JSON schema that the answer follows")
    strict: bool | None = Field(None, description="accepted; the answer always follows the schema")


class ResponseFormat(_Model):
    """The form that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            param = "response_format.json_schema"
            raise bad_request(f"Missing required parameter: {param}.", param, "missing_required_parameter")
        return self


class SamplingRequest(_Model):
    """The parameters that chat and text completions share."""

    model: str | None = Field(None, description="a name from `/v1/models`; optional while one model is served")
    stream: bool | None = Field(None, description="send the answer as server-sent events while it is written")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, description="number of independent answers")
    max_tokens: int | None = Field(None, ge=1, description="most tokens of the answer, tool output included")
    stop: Stops = Field(None, description="up to 4 strings; the answer ends before the first one that appears")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1, description="sample from the likeliest tokens of this total weight")
    top_k: int | None = Field(None, ge=-1, description="sample from this many likeliest tokens; 0 or -1 means all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="leave out tokens less likely than this share of the likeliest one"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="equal seeds and requests give equal answers")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="against tokens that have appeared")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="against tokens, each time they appear")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10, description="divides the logits of tokens that have appeared; 1 changes nothing"
    )
    logit_bias: dict[str, float] | None = Field(None, description="token id to a number from -100 to 100")
    regex: str | None = Field(None, min_length=1, description="a regular expression that the whole answer matches")
    priority: int | None = Field(
        None, ge=0, le=100, description="0 is the most urgent and the default; higher values wait for lower ones"
    )
    user: str | None = Field(None, description="accepted and not used")


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
    top_logprobs: int | None = Field(None, ge=0, le=20, description="likeliest alternatives to report for each token")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.regex is not None and self.response_format is not None and self.response_format.type != "text":
            raise invalid_value("Give either response_format or regex.", "regex")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid_value("top_logprobs needs logprobs to be true.", "top_logprobs")
        _refuse(self, _UNSUPPORTED)
        _refuse_unsupported_messages(self.messages)
        return self


class CompletionRequest(SamplingRequest):
    """Body of `POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0.6}}
    )

    prompt: Prompts
    logprobs: int | None = Field(
        None, ge=0, le=20, description="report log probabilities, with this many alternatives for each token"
    )

    @model_validator(mode="after")
    def _supported(self) -> Self:
        _refuse(self, _UNSUPPORTED)
        return self


Body = ChatRequest | CompletionRequest


class TokenizeRequest(_Model):
    """Body of `POST /tokenize`."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Hello there"}})

    model: str | None = None
    prompt: str | None = Field(None, description="text to encode")
    messages: list[ChatMessage] | None = Field(None, min_length=1, description="or a conversation, as chat sends it")
    add_special_tokens: bool | None = Field(None, description="begin a prompt with the token that begins documents")
    return_token_strs: bool | None = Field(None, description="also give the text of each token")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise invalid_value("Give either prompt or messages.", "prompt")
        _refuse_unsupported_messages(self.messages or ())
        return self


class DetokenizeRequest(_Model):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"example": {"tokens": [72, 105]}})

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
