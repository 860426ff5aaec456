"""`POST /v1/completions`: text goes on, without turns and without tools."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.choices import Answers
from services.gateway.answer.event_stream import DONE, EventStream, event, supervise
from services.gateway.answer.logprobs import completion_logprobs
from services.gateway.answer.merge import merge
from services.gateway.answer.usage import usage
from services.gateway.api.dependencies import Gateway, GatewayDep, RecordDep
from services.gateway.api.examples import COMPLETION_RESPONSES
from services.gateway.engines.prompts import check_length, encode_text
from services.gateway.engines.request import choose_seed
from services.gateway.engines.served_model import ServedModel
from services.gateway.errors import bad_request
from services.gateway.middleware.request_log import RequestRecord
from services.gateway.schemas import CompletionRequest, refuse_unsupported

router = APIRouter(tags=["OpenAI API"])


@router.post("/v1/completions", summary="Continue a text", responses=COMPLETION_RESPONSES)
async def create_completion(
    body: CompletionRequest, request: Request, gateway: GatewayDep, record: RecordDep
) -> Response:
    """Write what follows a text.

    A prompt of token ids is used as it is; a text gets the token in front that begins documents.
    """
    refuse_unsupported(body)
    gateway.check_choices((body.n or 1) * len(body.prompt))
    run = _Run(gateway, body, record)
    if body.stream:
        return EventStream(
            run.stream(),
            drain=gateway.drain,
            record=record,
            heartbeat_seconds=gateway.settings.heartbeat_seconds,
        )
    return JSONResponse(await supervise(run.collect(), request.receive, gateway.drain, record))


class _Run:
    """One request: its prompts go to the engines at the same time, each with ``n`` choices.

    Choice ``j`` of prompt ``k`` has the index ``k * n + j``.
    """

    def __init__(self, gateway: Gateway, body: CompletionRequest, record: RequestRecord) -> None:
        self._gateway = gateway
        self._body = body
        self._record = record
        self._n = body.n or 1
        self._seed = choose_seed(body)
        self._answers: dict[int, Answers] = {}
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response's events."""
        nothing_yet = {"usage": None} if self._body.include_usage else {}
        async with self._deltas() as deltas:
            async for index, delta in deltas:
                if delta or delta.finish_reason is not None:
                    yield event({**self._envelope(index), "choices": [self._choice(index, delta)], **nothing_yet})
        if self._body.include_usage:
            yield event({**self._envelope(0), "choices": [], "usage": usage(list(self._answers.values()))})
        yield DONE

    async def collect(self) -> dict[str, Any]:
        """The whole response."""
        wholes = [Delta() for _ in range(self._n * len(self._body.prompt))]
        async with self._deltas() as deltas:
            async for index, delta in deltas:
                whole = wholes[index]
                whole.text += delta.text
                whole.tokens += delta.tokens
                whole.offsets += delta.offsets
                whole.finish_reason = delta.finish_reason
        choices = [self._choice(index, whole) for index, whole in enumerate(wholes)]
        return {**self._envelope(0), "choices": choices, "usage": usage(list(self._answers.values()))}

    def _deltas(self) -> contextlib.aclosing[AsyncGenerator[tuple[int, Delta], None]]:
        return contextlib.aclosing(merge([self._answer(k) for k in range(len(self._body.prompt))]))

    async def _answer(self, k: int) -> AsyncGenerator[tuple[int, Delta], None]:
        async def encode(model: ServedModel) -> list[int]:
            return await _encode(model, self._body.prompt[k])

        # The seed moves on, so that equal prompts in a list get answers of their own.
        running = self._gateway.answer(self._body, encode, self._record, seed=self._seed + k, raw=True)
        async with running as answers:
            self._answers[k] = answers
            async for index, delta in answers.deltas():
                yield k * self._n + index, delta

    def _envelope(self, index: int) -> dict[str, Any]:
        model = self._answers[index // self._n].model
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        tokenizer = self._answers[index // self._n].model.tokenizer
        wanted = self._body.logprobs is not None
        return {
            "index": index,
            "text": delta.text,
            "logprobs": completion_logprobs(tokenizer, delta.tokens, delta.offsets) if wanted else None,
            "finish_reason": delta.finish_reason,
        }


async def _encode(model: ServedModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return check_length(model, await encode_text(model, prompt, "prompt", bos=True), "prompt")
    size = model.tokenizer.vocab_size
    if max(prompt) >= size:
        raise bad_request(
            f"prompt has the token id {max(prompt)}; {model.name} has ids from 0 to {size - 1}.",
            "prompt",
            "invalid_value",
        )
    return check_length(model, prompt, "prompt")
