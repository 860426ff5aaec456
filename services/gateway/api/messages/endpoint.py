"""The endpoint of the Messages API."""

import functools
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from services.gateway.answer.event_answer import Event, EventAnswer
from services.gateway.api.dependencies import PoolDep
from services.gateway.api.json_body import JsonRoute
from services.gateway.api.messages.output import Output
from services.gateway.api.messages.schema import UNSUPPORTED, MessagesRequest
from services.gateway.api.parameters import check_known
from services.gateway.engines.pool import EnginePool
from services.gateway.engines.request import PromptEncoder, encode_chat
from services.gateway.errors import ERROR_RESPONSES
from services.gateway.schemas import ChatParameters

router = APIRouter(tags=["Anthropic API"], responses=ERROR_RESPONSES, route_class=JsonRoute)

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


@router.post("/v1/messages", summary="Answer a conversation (Messages API)")
async def create_message(body: MessagesRequest, request: Request, pool: PoolDep) -> Response:
    """Write the assistant's next message, or continue its last message.

    The model may run Python while it answers. Then `content` has a `server_tool_use` and its result between the texts.
    """
    check_known(body, pool.settings, UNSUPPORTED)
    parameters = body.parameters
    turns = body.turns(parameters.offered_tools)
    continued = body.messages[-1].role == "assistant"
    encode = functools.partial(encode_chat, turns=turns, ending="continue" if continued else "answer")
    return await _MessageAnswer(request, pool, parameters, encode).respond()


class _MessageAnswer(EventAnswer):
    id_prefix = "msg_"

    def __init__(self, request: Request, pool: EnginePool, parameters: ChatParameters, encode: PromptEncoder) -> None:
        super().__init__(request, pool, parameters, [encode])
        self._output = Output()
        self._stop_reason: str | None = None
        self._stop_string: str | None = None

    async def write(self) -> AsyncGenerator[list[Event], None]:
        begun = False
        async with self.deltas() as deltas:
            async for _, delta in deltas:
                events: list[Event] = []
                if not begun:
                    begun = True
                    events.append({"type": "message_start", "message": self.result()})
                events += self._output.add(delta)
                yield events
                if delta.finish_reason is not None:
                    self._stop_string = delta.stop_string
                    ended = "end_turn" if delta.stop_string is None else "stop_sequence"
                    self._stop_reason = _STOP_REASONS.get(delta.finish_reason, ended)
        end = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_string}
        yield [{"type": "message_delta", "delta": end, "usage": self._usage()}, {"type": "message_stop"}]

    def result(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model(0).info.name,
            "content": list(self._output.blocks),
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_string,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        record = self.record
        return {
            "input_tokens": record.prompt_tokens - record.cached_prompt_tokens,
            "cache_read_input_tokens": record.cached_prompt_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": record.completion_tokens,
        }
