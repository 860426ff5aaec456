"""`POST /v1/chat/completions`: answers a conversation with the assistant's next message."""

import functools
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.logprobs import chat_logprobs
from services.gateway.answer.response import Answer
from services.gateway.api.dependencies import PoolDep
from services.gateway.api.examples import CHAT_RESPONSES
from services.gateway.engines.request import check_choices, conversation, encode_chat
from services.gateway.errors import ERROR_RESPONSES
from services.gateway.schemas import ChatRequest

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
