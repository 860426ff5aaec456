"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from nanochat_core.chat import Message
from nanochat_core.protos import engine_pb2
from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.choices import Answers
from services.gateway.answer.event_stream import DONE, EventStream, dumps, event, supervise
from services.gateway.answer.logprobs import chat_logprobs
from services.gateway.answer.usage import usage
from services.gateway.api.dependencies import Gateway, GatewayDep, RecordDep
from services.gateway.api.examples import CHAT_RESPONSES
from services.gateway.engines.prompts import conversation, encode_chat
from services.gateway.engines.request import choose_seed
from services.gateway.middleware.request_log import RequestRecord
from services.gateway.schemas import ChatRequest, refuse_unsupported

router = APIRouter(tags=["OpenAI API"])


@router.post("/v1/chat/completions", summary="Answer a conversation", responses=CHAT_RESPONSES)
async def create_chat_completion(
    body: ChatRequest, request: Request, gateway: GatewayDep, record: RecordDep
) -> Response:
    """Write the assistant's next message.

    The model may run Python while it answers: what it ran and what came back is in `nanochat.tool_events`.
    """
    refuse_unsupported(body)
    gateway.check_choices(body.n or 1)
    turns = conversation(body.messages)
    if body.stream:
        return EventStream(
            _stream(gateway, body, turns, record),
            drain=gateway.drain,
            record=record,
            heartbeat_seconds=gateway.settings.heartbeat_seconds,
        )
    work = _collect(gateway, body, turns, record)
    return JSONResponse(await supervise(work, request.receive, gateway.drain, record))


async def _stream(
    gateway: Gateway, body: ChatRequest, turns: Sequence[Message], record: RequestRecord
) -> AsyncGenerator[bytes, None]:
    async with gateway.answer(body, lambda model: encode_chat(model, turns), record, seed=choose_seed(body)) as answers:
        chunks = _Chunks(answers, logprobs=bool(body.logprobs), usage_wanted=body.include_usage)
        for index in range(body.n or 1):
            yield chunks.first(index)
        async for index, delta in answers.deltas():
            if delta:
                yield chunks.delta(index, delta)
            if delta.finish_reason is not None:
                yield chunks.last(index, delta.finish_reason)
        if body.include_usage:
            yield chunks.usage()
        yield DONE


async def _collect(
    gateway: Gateway, body: ChatRequest, turns: Sequence[Message], record: RequestRecord
) -> dict[str, Any]:
    n = body.n or 1
    texts: list[list[str]] = [[] for _ in range(n)]
    events: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    tokens: list[list[engine_pb2.Token]] = [[] for _ in range(n)]
    reasons: list[str | None] = [None] * n
    async with gateway.answer(body, lambda model: encode_chat(model, turns), record, seed=choose_seed(body)) as answers:
        async for index, delta in answers.deltas():
            texts[index].append(delta.text)
            events[index] += delta.tool_events
            tokens[index] += delta.tokens
            reasons[index] = delta.finish_reason
    choices = []
    for index in range(n):
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts[index]), "refusal": None}
        if events[index]:
            message["nanochat"] = {"tool_events": events[index]}
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(answers.model.tokenizer, tokens[index]) if body.logprobs else None,
                "finish_reason": reasons[index],
            }
        )
    return {**_envelope(answers, "chat.completion"), "choices": choices, "usage": usage([answers])}


def _envelope(answers: Answers, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": answers.model.name,
        "system_fingerprint": answers.model.fingerprint,
    }


class _Chunks:
    """The chunks of one stream. All that doesn't change within it is encoded once."""

    def __init__(self, answers: Answers, *, logprobs: bool, usage_wanted: bool) -> None:
        self._answers = answers
        self._tokenizer = answers.model.tokenizer
        self._logprobs = logprobs
        self._envelope = _envelope(answers, "chat.completion.chunk")
        self._head = f'data: {dumps(self._envelope)[:-1]},"choices":[{{"index":'
        # With usage asked for, OpenAI's chunks carry a null until the last.
        self._tail = ',"usage":null}\n\n' if usage_wanted else "}\n\n"

    def first(self, index: int) -> bytes:
        """The chunk with the role."""
        return self._encode(index, '{"role":"assistant","content":""}')

    def delta(self, index: int, delta: Delta) -> bytes:
        """What has become visible of a choice."""
        shown: dict[str, Any] = {}
        if delta.text:
            shown["content"] = delta.text
        if delta.tool_events:
            shown["nanochat"] = {"tool_events": delta.tool_events}
        logprobs = dumps(chat_logprobs(self._tokenizer, delta.tokens)) if self._logprobs else "null"
        return self._encode(index, dumps(shown), logprobs)

    def last(self, index: int, finish_reason: str) -> bytes:
        """The end of a choice."""
        return self._encode(index, "{}", finish_reason=f'"{finish_reason}"')

    def usage(self) -> bytes:
        """The token counts, without a choice."""
        return event({**self._envelope, "choices": [], "usage": usage([self._answers])})

    def _encode(self, index: int, delta: str, logprobs: str = "null", finish_reason: str = "null") -> bytes:
        choice = f'{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}]'
        return f"{self._head}{choice}{self._tail}".encode()
