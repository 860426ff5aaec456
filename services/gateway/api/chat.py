"""`POST /v1/chat/completions`: answers a conversation with the assistant's next message."""

import functools
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from services.gateway.answer.choice_answer import ChoiceAnswer
from services.gateway.answer.choice_decoder import Call, Delta
from services.gateway.answer.logprobs import chat_logprobs
from services.gateway.api.dependencies import PoolDep
from services.gateway.api.examples import CHAT_RESPONSES
from services.gateway.api.json_body import JsonRoute
from services.gateway.api.parameters import check_choices, check_known, wished_truncation
from services.gateway.engines.pool import EnginePool
from services.gateway.engines.request import PromptEncoder, Truncation, conversation, encode_chat, ending
from services.gateway.errors import ERROR_RESPONSES
from services.gateway.schemas import ChatRequest

router = APIRouter(tags=["OpenAI API"], responses=ERROR_RESPONSES, route_class=JsonRoute)


@router.post("/v1/chat/completions", summary="Answer a conversation", responses=CHAT_RESPONSES)
async def create_chat_completion(body: ChatRequest, request: Request, pool: PoolDep) -> Response:
    """Write the assistant's next message, or continue its last message.

    The model may run Python while it answers. `nanochat.tool_events` contains the code that ran and its output. If the
    request has `tools`, the answer may be a call of one of these tools, in `tool_calls`. If the oldest turns were left
    out because of `truncation`, `nanochat.left_out_turns` is their number.
    """
    check_known(body, pool.settings)
    check_choices(body.n or 1, pool.settings)
    turns = conversation(body.messages, body.offered_tools)
    truncation = wished_truncation(body)
    encode = functools.partial(encode_chat, turns=turns, ending=ending(body, turns), truncation=truncation)
    return await _ChatAnswer(request, pool, body, encode, truncation).respond()


class _ChatAnswer(ChoiceAnswer):
    id_prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self,
        request: Request,
        pool: EnginePool,
        body: ChatRequest,
        encode: PromptEncoder,
        truncation: Truncation | None,
    ) -> None:
        super().__init__(request, pool, body, [encode])
        self._truncation = truncation

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        extension = _extension(self._left_out | _events(delta))
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None, **extension}
        if delta.call is not None:
            message |= {"content": delta.text or None, "tool_calls": [_call(delta.call)]}
        logprobs = self._logprobs(index, delta)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in range(self.n):
            yield _piece(index, {"role": "assistant", "content": "", **_extension(self._left_out)})

    def pieces(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta:
            shown = ({"content": delta.text} if delta.text else {}) | _extension(_events(delta))
            if delta.call is not None:
                shown["tool_calls"] = [{"index": 0, **_call(delta.call)}]
            yield _piece(index, shown, self._logprobs(index, delta))
        if delta.finish_reason is not None:
            yield _piece(index, {}, finish_reason=delta.finish_reason)

    @property
    def _left_out(self) -> dict[str, Any]:
        count = self._truncation.left_out_turns if self._truncation is not None else 0
        return {"left_out_turns": count} if count else {}

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any] | None:
        return chat_logprobs(self.model(index).tokenizer, delta.tokens) if self.body.logprobs else None


def _piece(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _call(call: Call) -> dict[str, Any]:
    """Returns a call, or a part of a call, as JSON. Only the first part has the id, the type and the name."""
    if not call.id:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _events(delta: Delta) -> dict[str, Any]:
    return {"tool_events": delta.tool_events} if delta.tool_events else {}


def _extension(fields: dict[str, Any]) -> dict[str, Any]:
    return {"nanochat": fields} if fields else {}
