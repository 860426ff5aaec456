"""`POST /v1/chat/completions`: converts the messages into the model's turns and answers with the next turn."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from nanochat_core.chat import Message, Part
from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.logprobs import chat_logprobs
from services.gateway.answer.response import Answer
from services.gateway.api.dependencies import PoolDep
from services.gateway.api.examples import CHAT_RESPONSES
from services.gateway.engines.request import check_choices, encode_chat
from services.gateway.errors import ERROR_RESPONSES, invalid_value
from services.gateway.schemas import ChatMessage, ChatRequest, ToolEvent

router = APIRouter(tags=["OpenAI API"], responses=ERROR_RESPONSES)


@router.post("/v1/chat/completions", summary="Answer a conversation", responses=CHAT_RESPONSES)
async def create_chat_completion(body: ChatRequest, request: Request, pool: PoolDep) -> Response:
    """Write the assistant's next message.

    The model may run Python while it answers. `nanochat.tool_events` has the code that ran and its output.
    """
    check_choices(body.n or 1, pool.settings)
    prompt = functools.partial(encode_chat, turns=conversation(body.messages))
    return await _ChatAnswer(request, pool, body, [prompt]).respond()


class _ChatAnswer(Answer):
    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def whole(self, index: int, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None, **_extension(delta)}
        logprobs = self._logprobs(index, delta)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in range(self.body.n or 1):
            yield _piece(index, {"role": "assistant", "content": ""})

    def pieces(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta:
            shown = ({"content": delta.text} if delta.text else {}) | _extension(delta)
            yield _piece(index, shown, self._logprobs(index, delta))
        if delta.finish_reason is not None:
            yield _piece(index, {}, finish_reason=delta.finish_reason)

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any] | None:
        return chat_logprobs(self.model(index).tokenizer, delta.tokens) if self.body.logprobs else None


def _piece(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _extension(delta: Delta) -> dict[str, Any]:
    return {"nanochat": {"tool_events": delta.tool_events}} if delta.tool_events else {}


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """Turns the messages into alternating turns of user and assistant, as the model knows them.

    The model's format has no tokens for a system message and never has two turns of one side in a row. Therefore all
    system, developer and user messages between two answers become one user turn: in their order, separated by blank
    lines.

    Raises:
        ApiError: 400 if the result has an answer that no user message precedes, or does not end with a user message.
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
