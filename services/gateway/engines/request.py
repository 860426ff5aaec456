"""Converts a client's request to the engine's request: turns, token ids of the prompt and sampling parameters."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence

from nanochat_core.chat import Message, Part, render_prompt, stop_token_ids
from nanochat_core.protos import engine_pb2
from services.gateway.engines.model import ServedModel
from services.gateway.errors import ApiError, bad_request, invalid_value
from services.gateway.schemas import Body, ChatMessage, ChatRequest, ToolEvent
from services.gateway.settings import GatewaySettings

# Encoding this many characters takes about as long as handing the work to a thread and back.
_INLINE_CHARACTERS = 16_384
# The engine gets this value for a top_p of 0. For the client 0 means the narrowest choice, but for the engine 0 means
# "off".
_SMALLEST_TOP_P = 1e-6
_BIAS_LIMIT = 100

# Makes a prompt's token ids for a model.
PromptEncoder = Callable[[ServedModel], Awaitable[list[int]]]


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """Converts the messages to the model's format, in which turns of user and assistant alternate.

    The format has no tokens for a system message and never has two turns of one side in a row. Therefore all system,
    developer and user messages between two answers become one user turn. They keep their order, and blank lines
    separate them.

    Raises:
        ApiError: 400 if the first turn is an answer, or if the last turn is not a user turn.
    """
    turns: list[Message] = []
    asked: list[str] = []
    by_user = False
    for i, message in enumerate(messages):
        if message.role != "assistant":
            asked.append(message.content or "")
            by_user |= message.role == "user"
            continue
        if not by_user:
            raise invalid_value(
                f"messages[{i}] is an assistant message that no user message precedes: user and assistant take turns.",
                f"messages[{i}].role",
            )
        turns.append(_user_turn(asked))
        events = message.nanochat.tool_events if message.nanochat else []
        turns.append(Message("assistant", _assistant_parts(message.content or "", events, i)))
        asked, by_user = [], False
    if not by_user:
        raise invalid_value("The last message must be the user's: there is nothing to answer.", "messages")
    turns.append(_user_turn(asked))
    return turns


def _user_turn(texts: Sequence[str]) -> Message:
    return Message("user", (Part("text", "\n\n".join(texts)),))


def _assistant_parts(content: str, events: Sequence[ToolEvent], message_index: int) -> tuple[Part, ...]:
    """Puts an answer's tool calls and their output into the places where the model wrote them."""
    parts: list[Part] = []
    position, open_call = 0, None
    for k, event in enumerate(events):
        where = f"messages[{message_index}].nanochat.tool_events[{k}]"
        if event.type == "result":
            if event.call_index != open_call:
                raise invalid_value(
                    f"{where} is the result of call {event.call_index}, which isn't the call before it.",
                    f"{where}.call_index",
                )
            parts.append(Part("python_output", event.output or ""))
            open_call = None
            continue
        offset = event.offset or 0
        if not position <= offset <= len(content):
            raise invalid_value(
                f"{where}.offset is {offset}; it must lie between the call before it ({position}) and the end of "
                f"the content ({len(content)} characters).",
                f"{where}.offset",
            )
        if offset > position:
            parts.append(Part("text", content[position:offset]))
        parts.append(Part("python", event.code or ""))
        position, open_call = offset, event.call_index
    if position < len(content) or not parts:
        parts.append(Part("text", content[position:]))
    return tuple(parts)


async def encode_chat(model: ServedModel, turns: Sequence[Message]) -> list[int]:
    """Returns the token ids of the prompt that asks for the next assistant message."""
    characters = sum(len(part.text) for turn in turns for part in turn.parts)
    ids = await _encode(model, characters, lambda: render_prompt(model.tokenizer, turns), "messages")
    return check_length(model, ids, "messages")


async def encode_prompt(model: ServedModel, prompt: str | list[int]) -> list[int]:
    """Returns the token ids of a prompt.

    A text is encoded as the beginning of a document. Token ids from the client are only checked.
    """
    if isinstance(prompt, str):
        return check_length(model, await encode_text(model, prompt, bos=True), "prompt")
    size = model.tokenizer.vocab_size
    if max(prompt) >= size:
        message = f"prompt has the token id {max(prompt)}; {model.info.name} has ids from 0 to {size - 1}."
        raise invalid_value(message, "prompt")
    return check_length(model, prompt, "prompt")


async def encode_text(model: ServedModel, text: str, *, bos: bool) -> list[int]:
    """Returns the token ids of a text. If ``bos`` is true, the token that begins documents comes first.

    A text that is far too long for the context is refused. :func:`check_length` makes the exact check.
    """
    ids = await _encode(model, len(text), lambda: model.tokenizer.encode(text), "prompt")
    return [model.tokenizer.bos_id, *ids] if bos else ids


async def _encode(model: ServedModel, characters: int, encode: Callable[[], list[int]], param: str) -> list[int]:
    # Every character has at least one byte, so this is a lower bound of the token count. It needs no encoding.
    at_least = characters // model.longest_token_bytes
    if at_least > model.context_length:
        raise _too_long(model, f"at least {at_least}", param)
    if characters <= _INLINE_CHARACTERS:
        return encode()
    return await asyncio.to_thread(encode)


def check_length(model: ServedModel, ids: list[int], param: str) -> list[int]:
    """Returns ``ids`` if the context has room for them and one more token; otherwise raises an :class:`ApiError`."""
    if len(ids) >= model.context_length:
        raise _too_long(model, str(len(ids)), param)
    return ids


def _too_long(model: ServedModel, tokens: str, param: str) -> ApiError:
    info = model.info
    message = (
        f"The context of {info.name} is {model.context_length} tokens, answer included, and this request has "
        f"{tokens} tokens. Shorten it."
    )
    return bad_request(message, param, "context_length_exceeded")


def check_choices(choices: int, settings: GatewaySettings) -> None:
    """Raises an :class:`ApiError` with status 400 if a request asks for more continuations than the settings allow."""
    if choices > settings.max_choices:
        message = f"The request asks for {choices} answers; this server gives at most {settings.max_choices}."
        raise invalid_value(message, "n")


def engine_request(
    request: Body, model: ServedModel, prompt: Sequence[int], settings: GatewaySettings, *, request_id: str, seed: int
) -> engine_pb2.GenerateRequest:
    """Builds the engine's request for a prompt with fewer tokens than the context length.

    The engine gets the lowest 64 bits of ``seed``. A logit bias on an id that is no token of the model causes an
    :class:`ApiError` with status 400.
    """
    limit, alternatives = request.max_tokens, request.logprobs
    if isinstance(request, ChatRequest):
        limit = request.max_completion_tokens or limit
        alternatives = (request.top_logprobs or 0) if request.logprobs else None
    room = model.context_length - len(prompt)
    sampling = engine_pb2.SamplingParams(
        temperature=settings.default_temperature if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=1.0 if request.top_p is None else max(request.top_p, _SMALLEST_TOP_P),
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=seed % 2**64,
        max_tokens=min(limit or settings.default_max_tokens or room, room),
        stop_token_ids=stop_token_ids(model.tokenizer),
        logprobs=alternatives,
        logit_bias=_logit_bias(request.logit_bias or {}, model.tokenizer.vocab_size),
    )
    _constrain(sampling, request)
    return engine_pb2.GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        n=request.n or 1,
        sampling=sampling,
        tools=engine_pb2.ToolPolicy(enabled=isinstance(request, ChatRequest)),
        tokenizer_digest=model.tokenizer_digest,
        weights_digest=model.weights,
        priority=request.priority or 0,
    )


def _constrain(sampling: engine_pb2.SamplingParams, request: Body) -> None:
    """Sets the regular expression or the JSON schema that the answer must match, if the request has one."""
    wanted = request.response_format if isinstance(request, ChatRequest) else None
    if request.regex is not None:
        sampling.regex = request.regex
    elif wanted is not None and wanted.type == "json_object":
        sampling.json_object = True
    elif wanted is not None and wanted.json_schema is not None and wanted.type == "json_schema":
        sampling.json_schema = json.dumps(wanted.json_schema.schema_)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    checked = {}
    for key, value in bias.items():
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1
        if not 0 <= token_id < vocab_size:
            message = f"logit_bias names the token {key!r}; use ids from 0 to {vocab_size - 1}."
            raise invalid_value(message, "logit_bias")
        if abs(value) > _BIAS_LIMIT:
            message = f"logit_bias of token {key} is {value}; use -{_BIAS_LIMIT} to {_BIAS_LIMIT}."
            raise invalid_value(message, "logit_bias")
        checked[token_id] = value
    return checked
