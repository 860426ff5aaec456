"""The endpoint of the Responses API."""

import functools
import itertools
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request, Response

from services.gateway.answer.event_answer import Event, EventAnswer
from services.gateway.api.dependencies import PoolDep
from services.gateway.api.examples import RESPONSES_RESPONSES
from services.gateway.api.json_body import JsonRoute
from services.gateway.api.parameters import check_known, wished_truncation
from services.gateway.api.responses.kept import KeptResponses
from services.gateway.api.responses.output import Output
from services.gateway.api.responses.schema import UNSUPPORTED, InputItem, ResponsesRequest
from services.gateway.api.responses.turns import turns_of
from services.gateway.engines.pool import EnginePool
from services.gateway.engines.request import PromptEncoder, encode_chat
from services.gateway.errors import ERROR_RESPONSES
from services.gateway.schemas import ChatParameters

router = APIRouter(tags=["OpenAI API"], responses=ERROR_RESPONSES, route_class=JsonRoute)


async def _kept(request: Request) -> KeptResponses:
    return cast(KeptResponses, request.app.state.kept_responses)


KeptDep = Annotated[KeptResponses, Depends(_kept)]


@router.post("/v1/responses", summary="Answer a conversation (Responses API)", responses=RESPONSES_RESPONSES)
async def create_response(body: ResponsesRequest, request: Request, pool: PoolDep, kept: KeptDep) -> Response:
    """Write the assistant's next message.

    The model may run Python while it answers. Then `output` has a `code_interpreter_call` between the texts. If the
    request has functions in `tools`, the answer may be a `function_call`.
    """
    check_known(body, pool.settings, UNSUPPORTED)
    parameters = body.parameters
    items = await _conversation(body, kept, request.state.grant.caller.id)
    turns = turns_of(items, body.instructions, parameters.offered_tools)
    encode = functools.partial(encode_chat, turns=turns, truncation=wished_truncation(parameters))
    return await _ResponsesAnswer(request, pool, body, parameters, encode, kept, items).respond()


async def _conversation(body: ResponsesRequest, kept: KeptResponses, caller: str) -> list[InputItem]:
    """Returns the items of the kept conversation that the request continues, then the items of the request's input.

    Each reference to an earlier item is replaced by that item.
    """
    items: list[InputItem] = []
    if body.previous_response_id is not None:
        earlier = await kept.conversation(caller, body.previous_response_id)
        items = [InputItem.model_validate(item) for item in earlier]
    referred: dict[str, InputItem] = {}
    for i, item in enumerate(body.input):
        if item.type != "item_reference" or item.id is None:
            items.append(item)
            continue
        if item.id not in referred:
            found = await kept.item(caller, item.id, f"input[{i}].id")
            referred[item.id] = InputItem.model_validate(found)
        items.append(referred[item.id])
    return items


class _ResponsesAnswer(EventAnswer):
    id_prefix = "resp_"

    def __init__(
        self,
        request: Request,
        pool: EnginePool,
        body: ResponsesRequest,
        parameters: ChatParameters,
        encode: PromptEncoder,
        kept: KeptResponses,
        conversation: list[InputItem],
    ) -> None:
        super().__init__(request, pool, parameters, [encode])
        self._asked = body
        self._kept = kept
        self._caller = request.state.grant.caller.id
        self._conversation = conversation
        self._output = Output(logprobs=body.wants_logprobs)
        self._finish_reason: str | None = None
        self._numbers = itertools.count()  # sequence numbers of the events

    async def write(self) -> AsyncGenerator[list[Event], None]:
        begun = False
        async with self.deltas() as deltas:
            async for index, delta in deltas:
                events: list[Event] = []
                if not begun:
                    begun = True
                    kinds = ("response.created", "response.in_progress")
                    events += [{"type": kind, "response": self.result()} for kind in kinds]
                events += self._output.add(delta, self.model(index).tokenizer)
                yield self._numbered(events)
                self._finish_reason = delta.finish_reason or self._finish_reason
        if self._stores:
            conversation = [item.model_dump(exclude_none=True) for item in self._conversation]
            await self._kept.keep(self._caller, self.id, conversation, self._output.items)
        response = self.result()
        yield self._numbered([{"type": f"response.{response['status']}", "response": response}])

    def _numbered(self, events: list[Event]) -> list[Event]:
        return [event | {"sequence_number": next(self._numbers)} for event in events]

    @property
    def _stores(self) -> bool:
        return self._kept.enabled and self._asked.store is not False

    def result(self) -> dict[str, Any]:
        asked, reason = self._asked, self._finish_reason
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata or {},
            "model": self.model(0).info.name,
            "output": list(self._output.items),
            "parallel_tool_calls": False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": self._stores,
            "temperature": self.temperature,
            "text": {"format": self._format()},
            "tool_choice": self._tool_choice(),
            "tools": [tool.model_dump(exclude_none=True) for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": None if reason is None else self._usage(),
            "user": asked.user,
        }

    def _format(self) -> dict[str, Any]:
        wanted = self._asked.text.format if self._asked.text is not None else None
        if wanted is None or wanted.type != "json_schema":
            return {"type": "text" if wanted is None else wanted.type}
        return {"type": wanted.type, "name": wanted.name, "schema": wanted.schema_, "strict": True}

    def _tool_choice(self) -> str | dict[str, Any]:
        choice = self._asked.tool_choice
        if choice is None or isinstance(choice, str):
            return choice or "auto"
        return {"type": "function", "name": choice.name}

    def _usage(self) -> dict[str, Any]:
        record = self.record
        return {
            "input_tokens": record.prompt_tokens,
            "input_tokens_details": {"cached_tokens": record.cached_prompt_tokens, "cache_write_tokens": 0},
            "output_tokens": record.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": record.prompt_tokens + record.completion_tokens,
        }
