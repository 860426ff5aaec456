"""What the parts of a running gateway share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request

from nanochat_core.protos import engine_pb2
from services.gateway.answer.choices import Answers
from services.gateway.engines.generation import generate
from services.gateway.engines.pool import EnginePool
from services.gateway.engines.request import engine_request
from services.gateway.engines.served_model import ServedModel
from services.gateway.errors import bad_request
from services.gateway.metrics import Metrics
from services.gateway.middleware.drain import Drain
from services.gateway.middleware.request_log import RequestRecord
from services.gateway.schemas import ChatRequest, CompletionRequest
from services.gateway.settings import GatewaySettings


@dataclasses.dataclass
class Gateway:
    """One gateway: its settings and its long-lived parts."""

    settings: GatewaySettings
    pool: EnginePool
    metrics: Metrics
    drain: Drain

    def check_choices(self, choices: int) -> None:
        """
        Raises:
            ApiError: 400, more continuations than one request may have.
        """
        if choices > self.settings.max_choices:
            raise bad_request(
                f"The request asks for {choices} answers; this server gives at most {self.settings.max_choices}.",
                "n",
                "invalid_value",
            )

    @contextlib.asynccontextmanager
    async def answer(
        self,
        request: ChatRequest | CompletionRequest,
        encode: Callable[[ServedModel], Awaitable[list[int]]],
        record: RequestRecord,
        *,
        seed: int,
        raw: bool = False,
    ) -> AsyncIterator[Answers]:
        """Have an engine answer one prompt; leaving the block stops it.

        Args:
            encode: makes the prompt's tokens for the model that will answer.
            seed: of this prompt.
            raw: see :class:`~services.gateway.choices.Choice`.

        Raises:
            ApiError: the request doesn't fit the model, or no engine can take it.
        """

        async def prepare(model: ServedModel) -> engine_pb2.GenerateRequest:
            prompt = await encode(model)
            return engine_request(request, model, prompt, self.settings, request_id=record.request_id, seed=seed)

        async with generate(
            self.pool,
            self.metrics,
            request.model or None,
            prepare,
            request_id=record.request_id,
            timeout_seconds=self.settings.request_timeout_seconds,
        ) as generation:
            yield Answers(generation, self.metrics, record, n=request.n or 1, stops=request.stop or (), raw=raw)


async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


GatewayDep = Annotated[Gateway, Depends(_gateway)]
RecordDep = Annotated[RequestRecord, Depends(_record)]
