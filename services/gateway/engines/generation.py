"""A prompt at an engine: finding a replica that takes it, and reading what it answers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2
from services.gateway.engines.pool import EnginePool, Replica
from services.gateway.engines.served_model import ServedModel
from services.gateway.errors import ApiError, from_rpc
from services.gateway.metrics import Metrics

logger = logging.getLogger(__name__)

# Another replica may take what this one refused for such a reason.
_ELSEWHERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.FAILED_PRECONDITION,
)

Prepare = Callable[[ServedModel], Awaitable[engine_pb2.GenerateRequest]]


class Generation:
    """A running call of an engine.

    Attributes:
        model: the model that answers; its tokenizer is the one to decode with.
    """

    def __init__(self, replica: Replica, model: ServedModel, call: Any, first: Any, prompt_tokens: int) -> None:
        self.model = model
        self.prompt_tokens = prompt_tokens
        self._replica = replica
        self._call = call
        self._first = first

    async def read(self) -> engine_pb2.GenerateChunk | None:
        """The engine's next chunk; ``None`` after the last.

        Raises:
            ApiError: the engine failed.
        """
        chunk, self._first = self._first, None
        if chunk is None:
            try:
                chunk = await self._call.read()
            except grpc.aio.AioRpcError as error:
                _note_failure(self._replica, error)
                raise from_rpc(error, started=True) from error
        return None if chunk is grpc.aio.EOF else chunk


@contextlib.asynccontextmanager
async def generate(
    pool: EnginePool,
    metrics: Metrics,
    model_name: str | None,
    prepare: Prepare,
    *,
    request_id: str,
    timeout_seconds: float,
) -> AsyncIterator[Generation]:
    """Start generating and wait for the first chunk; leaving the block cancels the call.

    Until the first chunk is there, a replica that can't be reached or has no room is replaced by another one, and one
    that has taken up a model with another tokenizer gets a prompt in the tokens of that.

    Args:
        prepare: makes the request for the model of the replica at hand; replicas may serve different revisions.
        request_id: goes along as gRPC metadata ``x-request-id``.

    Raises:
        ApiError: no replica could start on it.
    """
    failed: list[Replica] = []
    renewed: set[Replica] = set()
    failure: ApiError | None = None
    while True:
        try:
            replica = pool.select(model_name, failed)
        except ApiError as error:
            raise failure or error from None
        if failed:
            metrics.failovers.inc()
        model = replica.model
        assert model is not None, "select() gives replicas with a model only"
        request = await prepare(model)
        with replica.busy(request.n):
            call = replica.stub.Generate(request, timeout=timeout_seconds, metadata=(("x-request-id", request_id),))
            try:
                try:
                    first = await call.read()
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.FAILED_PRECONDITION and replica not in renewed:
                        renewed.add(replica)
                        if await _renew(replica):
                            continue
                    _note_failure(replica, error)
                    failure = from_rpc(error, started=False)
                    if error.code() not in _ELSEWHERE:
                        raise failure from error
                    failed.append(replica)
                    continue
                metrics.prompt_tokens.inc(len(request.prompt_token_ids))
                yield Generation(replica, model, call, first, len(request.prompt_token_ids))
                return
            finally:
                call.cancel()


async def _renew(replica: Replica) -> bool:
    """See what the replica serves now; False when it doesn't say."""
    try:
        await replica.refresh_model()
    except (grpc.aio.AioRpcError, UserError) as error:
        logger.warning("model unknown", extra={"address": replica.address, "reason": str(error)})
        return False
    return True


def _note_failure(replica: Replica, error: grpc.aio.AioRpcError) -> None:
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        replica.mark_down(f"{code.name}: {details}")
    elif code is not grpc.StatusCode.INVALID_ARGUMENT:
        logger.warning("engine call failed", extra={"address": replica.address, "code": code.name, "details": details})
