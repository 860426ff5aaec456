"""From a request's messages to the tokens that the model reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from nanochat_core.chat import Message, Part, render_prompt
from nanochat_core.tokenizer import Tokenizer
from services.gateway.engines.served_model import ServedModel
from services.gateway.errors import ApiError, bad_request
from services.gateway.schemas import ChatMessage, ToolEvent

# Encoding so many characters takes about as long as handing the work to a thread and back.
_INLINE_CHARACTERS = 16_384


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """Turns of user and assistant, as the model knows them.

    The format has no tokens for a system message and no two turns of one side in a row: all that comes between two
    answers (system, developer and user messages, in their order, a blank line between them) is one user turn.

    Raises:
        ApiError: 400, when that leaves two answers in a row, an answer to nothing or nothing to answer.
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
            raise bad_request(
                f"messages[{i}] is an assistant message that no user message precedes: user and assistant take turns.",
                f"messages[{i}].role",
                "invalid_value",
            )
        turns.append(_user_turn(asked))
        events = message.nanochat.tool_events if message.nanochat else []
        turns.append(Message("assistant", assistant_parts(message.content or "", events, i)))
        asked, by_user = [], False
    if not by_user:
        raise bad_request(
            "The last message must be the user's: there is nothing to answer.", "messages", "invalid_value"
        )
    turns.append(_user_turn(asked))
    return turns


def _user_turn(texts: Sequence[str]) -> Message:
    return Message("user", (Part("text", "\n\n".join(texts)),))


def assistant_parts(content: str, events: Sequence[ToolEvent], message_index: int) -> tuple[Part, ...]:
    """Put an answer's tool calls and their output back to where the model wrote them.

    Raises:
        ApiError: 400, when the events don't fit the content or each other.
    """
    parts: list[Part] = []
    position, open_call = 0, None
    for k, event in enumerate(events):
        where = f"messages[{message_index}].nanochat.tool_events[{k}]"
        if event.type == "result":
            if event.call_index != open_call:
                raise bad_request(
                    f"{where} is the result of call {event.call_index}, which isn't the call before it.",
                    f"{where}.call_index",
                    "invalid_value",
                )
            parts.append(Part("python_output", event.output or ""))
            open_call = None
            continue
        offset = event.offset or 0
        if not position <= offset <= len(content):
            raise bad_request(
                f"{where}.offset is {offset}; it must lie between the call before it ({position}) and the end of "
                f"the content ({len(content)} characters).",
                f"{where}.offset",
                "invalid_value",
            )
        if offset > position:
            parts.append(Part("text", content[position:offset]))
        parts.append(Part("python", event.code or ""))
        position, open_call = offset, event.call_index
    if position < len(content) or not parts:
        parts.append(Part("text", content[position:]))
    return tuple(parts)


async def encode_chat(model: ServedModel, turns: Sequence[Message]) -> list[int]:
    """The prompt that asks for the next assistant message.

    Raises:
        ApiError: 400 ``context_length_exceeded``.
    """
    characters = sum(len(part.text) for turn in turns for part in turn.parts)
    ids = await _encode(model, characters, lambda tokenizer: render_prompt(tokenizer, turns), "messages")
    return check_length(model, ids, "messages")


async def encode_text(model: ServedModel, text: str, param: str, *, bos: bool) -> list[int]:
    """Text as the beginning of a document, or with ``bos=False`` just its tokens.

    Raises:
        ApiError: 400 ``context_length_exceeded``, when it can't be in the context by far.
    """
    ids = await _encode(model, len(text), lambda tokenizer: tokenizer.encode(text), param)
    return [model.tokenizer.bos_id, *ids] if bos else ids


async def _encode(
    model: ServedModel, characters: int, encode: Callable[[Tokenizer], list[int]], param: str
) -> list[int]:
    # Every character is at least one byte, so this many tokens are certain without counting them.
    at_least = characters // model.longest_token_bytes
    if at_least > model.context_length:
        raise _too_long(model, f"at least {at_least}", param)
    if characters <= _INLINE_CHARACTERS:
        return encode(model.tokenizer)
    return await asyncio.to_thread(encode, model.tokenizer)


def check_length(model: ServedModel, ids: list[int], param: str) -> list[int]:
    """``ids`` unless they leave no room for a single token of an answer.

    Raises:
        ApiError: 400 ``context_length_exceeded`` with both numbers.
    """
    if len(ids) >= model.context_length:
        raise _too_long(model, str(len(ids)), param)
    return ids


def _too_long(model: ServedModel, tokens: str, param: str) -> ApiError:
    return bad_request(
        f"The context of {model.name} is {model.context_length} tokens, answer included, and this request has "
        f"{tokens} tokens. Shorten it.",
        param,
        "context_length_exceeded",
    )
