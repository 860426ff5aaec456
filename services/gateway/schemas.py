"""Request bodies of the API, with all checks that don't depend on the model."""

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from services.gateway.errors import bad_request, invalid_value, shown

MAX_STOP_STRINGS = 4
# The gateway compares each new piece of text with the stop strings, so their length must have a bound.
MAX_STOP_CHARACTERS = 1000
# Bounds of lists and objects. Checking an entry takes microseconds, so without bounds a body of 1 MB could take
# seconds. Together with fail_fast, which stops the check of a list at its first wrong entry, the bounds also limit the
# number of errors that pydantic collects.
MAX_MESSAGES = 2048
MAX_PARTS = 2048
MAX_TOOL_EVENTS = 1024
MAX_PROMPTS = 2048
MAX_DETOKENIZED = 131_072
MAX_BIASES = 1024
MAX_CALLS = 128
MAX_CHOICES_OF_TEXT = 1024
MAX_STOP_TOKENS = 128
# Largest length of the schemas of all tools together, in characters of JSON. The engine refuses a longer constraint.
# The constraint also contains the names of the tools, so the engine may refuse slightly shorter schemas, too.
MAX_TOOL_CHARACTERS = 65_536
# Largest number of log probabilities that one answer may have for its prompts. An answer with this many log
# probabilities needs about 100 MB, and half a second to write. For a prompt that is text, each character counts as a
# token, because the number of tokens is not known yet.
MAX_SCORES = 500_000
MAX_FIELDS = 256

# Largest number of tools in a request, as in OpenAI's API.
MAX_TOOLS = 128

# Parameters of OpenAI's and vLLM's APIs that would change the answer and that this server doesn't support. For each
# parameter, the tuple holds the values that change nothing. Only these values and null are accepted.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "echo": (False,),  # unsupported in chat only
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_grammar": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),  # only chat completions support the other types
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "structural_tag": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # unsupported in text completions only
    "tools": ([],),  # unsupported in text completions only
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_UNSUPPORTED_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {"audio": (), "function_call": ()}
# Parameters of OpenAI's API that change no answer here: the server stores no chat completions, for example, and all
# requests have the same service tier.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",  # an answer has one call at most
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    }
)


def _reject(message: str) -> NoReturn:
    # pydantic reads the message as a template. The client's text may have braces, so it must be an argument of the
    # template.
    raise PydanticCustomError("invalid_value", "{reason}", {"reason": message})


def _whole_number(value: Any) -> Any:
    """Reads 10.0 as 10, because some clients have one type for all numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole_number)]


def _join_parts(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    _check_length(value, MAX_PARTS, "parts")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            _reject(f"part {i} is of type {shown(repr(kind))}, and this model reads text parts only")
        if not isinstance(part.get("text"), str):
            _reject(f"part {i} has no text")
        texts.append(part["text"])
    return "\n".join(texts)


def _list_stops(value: Any) -> Any:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list):
        _check_length(stops, MAX_STOP_STRINGS, "stop strings")
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        _reject("use a string or a list of strings")
    if "" in stops:
        _reject("a stop string can't be empty")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        _reject(f"a stop string can have at most {MAX_STOP_CHARACTERS} characters")
    return stops


def _list_prompts(value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value:
        _check_length(value, MAX_PROMPTS, "prompts")
        if all(isinstance(item, str) for item in value) or all(map(_is_ids, value)):
            return value
    _reject("use a string, a list of strings, a list of token ids or a list of lists of token ids; no empty lists")


def _is_ids(value: Any) -> bool:
    # The list is read by set() and min(), because a loop would take several times as long for a long list.
    return isinstance(value, list) and set(map(type, value)) == {int} and min(value) >= 0


def _check_length(value: list[Any] | dict[Any, Any], most: int, name: str) -> None:
    if len(value) > most:
        _reject(f"at most {most} {name} are allowed, but there are {len(value)}")


def _few_biases(value: Any) -> Any:
    if isinstance(value, dict):
        _check_length(value, MAX_BIASES, "tokens")
    return value


class ApiModel(BaseModel):
    """A JSON object of the API. Unknown fields are kept, so that an error can name them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict):
            _check_length(value, MAX_FIELDS, "fields")
        return value


def refuse(model: ApiModel, unsupported: Mapping[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Refuses fields that would change the answer but that this server does not support.

    ``unsupported`` maps the name of each such field to the values that change nothing. Only these values and None are
    accepted. Raises an :class:`ApiError` with status 400.
    """
    for name, value in (model.model_extra or {}).items():
        if name in unsupported and value is not None and value not in unsupported[name]:
            param = f"{prefix}{name}"
            raise bad_request(f"{param} is not supported by this server.", param, "unsupported_parameter")


def refuse_unknown(body: ApiModel, known: Collection[str]) -> None:
    """Refuses parameters that this server does not know, in the words of OpenAI's server, which also refuses them.

    ``known`` contains the names of further parameters that the endpoint knows. Raises an :class:`ApiError` with status
    400.
    """
    for name in body.model_extra or {}:
        if name not in _UNSUPPORTED and name not in _WITHOUT_EFFECT and name not in known:
            name = shown(name)
            raise bad_request(f"Unrecognized request argument supplied: {name}.", name, "unknown_parameter")


class TextPart(ApiModel):
    """A part of a message's content, which must be text."""

    type: Literal["text"]
    text: str


Content = Annotated[str | None, BeforeValidator(_join_parts, json_schema_input_type=str | list[TextPart])]
_StopList = Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)]
Stops = Annotated[list[str] | None, BeforeValidator(_list_stops, json_schema_input_type=str | _StopList)]
Prompts = Annotated[
    list[str] | list[list[int]],
    BeforeValidator(_list_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class Picture(ApiModel):
    """A picture that the code of a tool call made."""

    name: str = Field(description="file name, such as `figure-1.png`")
    media_type: str = Field(description="such as `image/png`")
    data: str = Field(description="the picture in base64")


class ToolEvent(ApiModel):
    """A call of the Python tool inside an assistant's message, or the result of such a call."""

    type: Literal["call", "result"]
    index: int | None = Field(
        None, ge=0, description="place in the list of tool events, by which clients join the parts of a stream"
    )
    call_index: int = Field(ge=0, description="counts the calls of the message from 0")
    code: str | None = Field(None, description="call: the Python code that ran")
    offset: int | None = Field(
        None, ge=0, description="call: number of characters (Unicode code points) of `content` before the call"
    )
    status: str | None = Field(None, description="result: `ok`, or the kind of failure")
    output: str | None = Field(None, description="result: the text that the model reads")
    duration_seconds: float | None = Field(None, description="result: how long the code ran")
    pictures: list[Picture] | None = Field(
        None, description="result: pictures that the code made, if any; not used in a request"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "call" and (self.code is None or self.offset is None):
            _reject("a call needs code and offset")
        if self.type == "result" and self.output is None:
            _reject("a result needs output")
        return self


class Extension(ApiModel):
    """Fields that this server adds to OpenAI's format."""

    tool_events: list[ToolEvent] = Field(default_factory=list, max_length=MAX_TOOL_EVENTS, fail_fast=True)


class FunctionCall(ApiModel):
    """A function's name and the arguments with which it is called."""

    name: str
    arguments: str = Field(description="JSON, as the model wrote it")


class ToolCall(ApiModel):
    """A call of one of the client's tools."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(ApiModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    tool_calls: list[ToolCall] | None = Field(
        None, max_length=MAX_CALLS, fail_fast=True, description="assistant: the calls in this answer"
    )
    tool_call_id: str | None = Field(None, description="tool: id of the call whose result this message is")
    nanochat: Extension | None = Field(
        None, description="assistant: the object from the server's answer, so that the model sees its tool calls"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.role != "assistant":
            if self.content is None:
                _reject(f"a {self.role} message needs content")
            if self.tool_calls or (self.nanochat is not None and self.nanochat.tool_events):
                _reject("only assistant messages have tool calls and tool events")
            if self.role == "tool" and self.tool_call_id is None:
                _reject("a tool message needs tool_call_id")
        elif self.content is None and self.nanochat is None and not self.tool_calls and not self.model_extra:
            _reject("an assistant message needs content")
        return self


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def _refuse_unsupported_messages(messages: Sequence[ChatMessage]) -> None:
    """Raises an :class:`ApiError` with status 400 if a message has a field that this server doesn't support."""
    for i, message in enumerate(messages):
        refuse(message, _UNSUPPORTED_IN_MESSAGE, f"messages[{i}].")


class StreamOptions(ApiModel):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="send a last chunk with the token counts")
    continuous_usage_stats: bool | None = Field(
        None, description="with `include_usage`: also send the token counts so far in every chunk"
    )


class JsonSchemaFormat(ApiModel):
    """A JSON schema for the answer, with its name."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="letters, digits, `_` and `-`, up to 64")
    description: str | None = Field(None, description="accepted and not used")
    schema_: dict[str, Any] = Field(alias="schema", description="the JSON schema that the answer follows")
    strict: bool | None = Field(None, description="accepted; the answer always follows the schema")


class ResponseFormat(ApiModel):
    """The form that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            param = "response_format.json_schema"
            raise bad_request(f"Missing required parameter: {param}.", param, "missing_required_parameter")
        return self


class FunctionDefinition(ApiModel):
    """A function that the client runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="letters, digits, `_` and `-`, up to 64")
    description: str | None = Field(None, description="what the function does; the model reads it")
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments; default: no arguments")
    strict: bool | None = Field(None, description="accepted; the arguments always follow the schema")


class FunctionTool(ApiModel):
    """A tool that the client offers to the model."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(ApiModel):
    """The name of a function in `tools`."""

    name: str


class NamedTool(ApiModel):
    """A value of `tool_choice` that makes the answer a call of one function."""

    type: Literal["function"] = "function"
    function: NamedFunction

    @property
    def name(self) -> str:
        return self.function.name


def _tool_choice(value: Any) -> Any:
    if value is None or isinstance(value, NamedTool) or value in ("none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        _reject('use "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')
    return NamedTool(function=NamedFunction(name=name))


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool | None, BeforeValidator(_tool_choice)]


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The form that the text of an answer must have."""

    parameter: str  # name of the request's parameter that sets the constraint
    field: Literal["json_object", "json_schema", "regex", "text_or_json_schema"]  # field of the engine's SamplingParams
    value: str | bool


def call_schema(tools: Sequence[FunctionTool]) -> dict[str, Any]:
    """The JSON schema of ``{"name": ..., "arguments": ...}``, a call of one of the tools.

    Raises an :class:`ApiError` with status 400 if the schemas of the tools are too long.
    """
    length = sum(len(json.dumps(tool.function.parameters)) for tool in tools)
    if length > MAX_TOOL_CHARACTERS:
        most = MAX_TOOL_CHARACTERS
        raise invalid_value(f"The schemas of tools have {length} characters; at most {most} are allowed.", "tools")
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": {"$ref": f"#/$defs/{tool.function.name}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ],
        "$defs": {
            tool.function.name: _moved(
                {"type": "object", "additionalProperties": False, "properties": {}}
                if not tool.function.parameters
                else {"type": "object", **tool.function.parameters},
                f"#/$defs/{tool.function.name}",
            )
            for tool in tools
        },
    }


# Keywords of JSON Schema whose values are data, in which "$ref" is no reference.
_DATA_KEYWORDS = {"const", "default", "enum", "examples"}
# Keywords of JSON Schema whose values map names to schemas.
_NAMED_SCHEMAS = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}


def _moved(schema: Any, place: str) -> Any:
    """Returns a copy of the schema for use inside another schema, with adjusted references.

    ``place`` is the JSON pointer of the copy in the other schema, such as ``#/$defs/name``.
    """
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = dict(schema)
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in _NAMED_SCHEMAS and isinstance(value, dict):
            moved[key] = {name: _moved(named, place) for name, named in value.items()}
        elif key not in _DATA_KEYWORDS:
            moved[key] = _moved(value, place)
    return moved


Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES_OF_TEXT, fail_fast=True)]


class StructuredOutputs(ApiModel):
    """vLLM's form of constraints on the answer. A request sets at most one of the fields."""

    json_: str | dict[str, Any] | None = Field(None, alias="json", description="a JSON schema")
    regex: str | None = Field(None, min_length=1, description="a regular expression")
    choice: Choices | None = Field(None, description="the possible answers")
    json_object: bool | None = Field(None, description="any JSON object")

    @model_validator(mode="after")
    def _supported(self) -> Self:
        refuse(self, {"grammar": (), "structural_tag": ()}, "structured_outputs.")
        return self


_REGEX_CHARACTERS = re.compile(r"[\\.+*?()|\[\]{}^$]")


def _one_of(texts: Sequence[str]) -> str:
    return "|".join(f"({_REGEX_CHARACTERS.sub(lambda match: chr(92) + match[0], text)})" for text in texts)


def _schema_text(schema: str | dict[str, Any]) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


class SamplingRequest(ApiModel):
    """The parameters that chat and text completions share."""

    model: str | None = Field(None, description="a name from `/v1/models`; optional while one model is served")
    stream: bool | None = Field(None, description="send the answer as server-sent events while it is written")
    stream_options: StreamOptions | None = None
    n: Integer | None = Field(None, ge=1, description="number of independent answers")
    max_tokens: Integer | None = Field(
        None, ge=1, description="maximum number of tokens of the answer, tool output included"
    )
    stop: Stops = Field(None, description="up to 4 strings; the answer ends before the first one that appears")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always selects the likeliest token")
    top_p: float | None = Field(
        None, ge=0, le=1, description="sample from the likeliest tokens with this total probability"
    )
    top_k: Integer | None = Field(None, ge=-1, description="sample from this many likeliest tokens; 0 or -1 means all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="leave out tokens below this share of the likeliest token's probability"
    )
    seed: Integer | None = Field(
        None,
        ge=-(2**63),
        lt=2**64,
        description="equal requests with equal seeds get equal answers from the same model revision, except for "
        "rounding on GPUs",
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="subtracted once from the logits of tokens that the answer contains"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="subtracted from a token's logit each time that the answer contains the token"
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=10,
        description="above 1, makes tokens of the prompt and the answer less likely; 1 changes nothing",
    )
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few_biases)] = Field(
        None, description="maps token ids to numbers from -100 to 100 that are added to the logits of these tokens"
    )
    stop_token_ids: list[Integer] | None = Field(
        None,
        max_length=MAX_STOP_TOKENS,
        fail_fast=True,
        description="further token ids that end the answer; the token that ends the answer is its last token",
    )
    min_tokens: Integer | None = Field(
        None, ge=0, le=2**31, description="no stop token ends the answer before this many tokens"
    )
    ignore_eos: bool | None = Field(None, description="continue up to `max_tokens`, even if the model ends its message")
    regex: str | None = Field(None, min_length=1, description="a regular expression that the whole answer matches")
    structured_outputs: StructuredOutputs | None = Field(None, description="constraints on the answer, in vLLM's form")
    guided_json: str | dict[str, Any] | None = Field(None, description="a JSON schema, in vLLM's earlier form")
    guided_regex: str | None = Field(None, min_length=1, description="a regular expression, in vLLM's earlier form")
    guided_choice: Choices | None = Field(None, description="the possible answers, in vLLM's earlier form")
    priority: Integer | None = Field(
        None, ge=0, le=100, description="0 (default) is the most urgent; a request waits for requests with lower values"
    )
    user: str | None = Field(None, description="accepted and not used")

    @property
    def limit(self) -> int | None:
        """The largest number of tokens of the answer; None if the request sets no limit."""
        return self.max_tokens

    @functools.cached_property
    def constraint(self) -> Constraint | None:
        """The constraint on the answer; None if the request sets none.

        Raises an :class:`ApiError` with status 400 if the request sets more than one.
        """
        found = list(self._constraints())
        if len(found) > 1:
            first, second = found[0].parameter, found[1].parameter
            raise invalid_value(f"Give only one of {first} and {second}.", second)
        return found[0] if found else None

    def _constraints(self) -> Iterator[Constraint]:
        if self.regex is not None:
            yield Constraint("regex", "regex", self.regex)
        if self.guided_regex is not None:
            yield Constraint("guided_regex", "regex", self.guided_regex)
        if self.guided_json is not None:
            yield Constraint("guided_json", "json_schema", _schema_text(self.guided_json))
        if self.guided_choice is not None:
            yield Constraint("guided_choice", "regex", _one_of(self.guided_choice))
        wanted = self.structured_outputs
        if wanted is None:
            return
        if wanted.regex is not None:
            yield Constraint("structured_outputs.regex", "regex", wanted.regex)
        if wanted.json_ is not None:
            yield Constraint("structured_outputs.json", "json_schema", _schema_text(wanted.json_))
        if wanted.choice is not None:
            yield Constraint("structured_outputs.choice", "regex", _one_of(wanted.choice))
        if wanted.json_object:
            yield Constraint("structured_outputs.json_object", "json_object", True)

    def check(self) -> None:
        """Raises an :class:`ApiError` with status 400 if parameters do not fit together or are not supported."""
        if self.min_tokens and self.limit is not None and self.min_tokens > self.limit:
            raise invalid_value("min_tokens is larger than the limit on the answer's tokens.", "min_tokens")
        if (constraint := self.constraint) is not None and (self.min_tokens or self.ignore_eos):
            extra = "min_tokens" if self.min_tokens else "ignore_eos"
            raise invalid_value(f"{extra} and {constraint.parameter} exclude each other.", extra)
        refuse(self, _UNSUPPORTED)


class ChatParameters(SamplingRequest):
    """The parameters of an answer in a conversation."""

    response_format: ResponseFormat | None = Field(None, description="make the answer JSON; turns the Python tool off")
    max_completion_tokens: Integer | None = Field(
        None, ge=1, description="newer name of `max_tokens`; if both are set, this value is used"
    )
    logprobs: bool | None = Field(None, description="report the log probability of each token of the text")
    top_logprobs: Integer | None = Field(
        None, ge=0, le=20, description="number of likeliest alternatives to report for each token"
    )
    tools: list[FunctionTool] | None = Field(
        None,
        max_length=MAX_TOOLS,
        fail_fast=True,
        description="functions that the client runs; unless `tool_choice` is `none`, they turn the Python tool off",
    )
    tool_choice: ToolChoice = Field(
        None, description="`auto` (default): text or a call; `required` or a function's name: a call; `none`: text"
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="`auto` leaves out the oldest messages if the conversation is longer than the context"
    )

    @property
    def limit(self) -> int | None:
        """The largest number of tokens of the answer; None if the request sets no limit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered_tools(self) -> list[FunctionTool]:
        """The tools that the prompt describes. If ``tool_choice`` names a tool, the answer may call only this tool."""
        return [] if self.tool_choice == "none" else self.tools or []

    def _constraints(self) -> Iterator[Constraint]:
        yield from super()._constraints()
        wanted, choice = self.response_format, self.tool_choice
        if wanted is not None and wanted.type == "json_object":
            yield Constraint("response_format", "json_object", True)
        elif wanted is not None and wanted.json_schema is not None and wanted.type == "json_schema":
            schema = json.dumps(wanted.json_schema.schema_)
            yield Constraint("response_format.json_schema.schema", "json_schema", schema)
        if isinstance(choice, NamedTool):
            named = [tool for tool in self.offered_tools if tool.function.name == choice.name]
            yield Constraint("tools", "json_schema", json.dumps(call_schema(named)))
        elif self.offered_tools:
            field: Literal["json_schema", "text_or_json_schema"] = "text_or_json_schema"
            if choice == "required":
                field = "json_schema"
            yield Constraint("tools", field, json.dumps(call_schema(self.offered_tools)))

    def check(self) -> None:
        """Raises an :class:`ApiError` with status 400 if parameters do not fit together or are not supported."""
        names = [tool.function.name for tool in self.tools or ()]
        for i, name in enumerate(names):
            if name in names[:i]:
                param = f"tools[{i}].function.name"
                raise invalid_value(f"{param} is {shown(name)!r}, which is the name of an earlier function.", param)
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            raise invalid_value(
                f"tool_choice names {shown(self.tool_choice.name)!r}, which is not in tools.", "tool_choice"
            )
        if self.tool_choice == "required" and not names:
            raise invalid_value('tool_choice is "required", but tools has no function.', "tool_choice")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid_value("top_logprobs needs logprobs to be true.", "top_logprobs")
        super().check()


class ChatRequest(ChatParameters):
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

    messages: Messages
    continue_final_message: bool | None = Field(
        None, description="continue the last message; by default, an assistant's last message is continued"
    )
    add_generation_prompt: bool | None = Field(
        None, description="true: begin a new assistant message; false: the prompt ends after the last message"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.check()
        _refuse_unsupported_messages(self.messages)
        return self


class CompletionRequest(SamplingRequest):
    """Body of `POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0.6}}
    )

    prompt: Prompts
    max_tokens: Integer | None = Field(
        None, ge=0, description="maximum number of tokens of the text; 0 only scores the prompt"
    )
    echo: bool | None = Field(None, description="put the prompt, and its log probabilities, in front of the text")
    logprobs: Integer | None = Field(
        None, ge=0, le=20, description="report log probabilities, with this many alternatives for each token"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.check()
        if self.echo and self.logprobs is not None:
            size = sum(map(len, self.prompt)) * (self.logprobs + 1)
            if size > MAX_SCORES:
                raise invalid_value(
                    f"With echo and logprobs, the length of the prompts times (logprobs + 1) is at most {MAX_SCORES}, "
                    f"but here it is {size}. Send fewer prompts in a request.",
                    "prompt",
                )
        return self


Body = ChatParameters | CompletionRequest


class TokenizeRequest(ApiModel):
    """Body of `POST /tokenize`."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Hello there"}})

    model: str | None = None
    prompt: str | None = Field(None, description="text to encode")
    messages: Messages | None = Field(
        None, description="a conversation, as in `/v1/chat/completions`, instead of `prompt`"
    )
    add_special_tokens: bool | None = Field(
        None, description="put the token that begins documents in front of the prompt (default: true)"
    )
    continue_final_message: bool | None = Field(None, description="as in `/v1/chat/completions`")
    add_generation_prompt: bool | None = Field(None, description="as in `/v1/chat/completions`")
    return_token_strs: bool | None = Field(None, description="also return the text of each token")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise invalid_value("Give either prompt or messages.", "prompt")
        _refuse_unsupported_messages(self.messages or ())
        return self


class DetokenizeRequest(ApiModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"example": {"tokens": [72, 105]}})

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=MAX_DETOKENIZED, fail_fast=True)
