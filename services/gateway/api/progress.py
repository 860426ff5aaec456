"""`/progress`: the progress of the model's training, which an engine reads from the artifact store."""

import asyncio
import json
import time
from typing import Annotated, Any, cast

import grpc
from fastapi import APIRouter, Depends, Request

from nanochat_core.protos import engine_pb2
from services.gateway.api.dependencies import PoolDep
from services.gateway.engines.pool import EnginePool
from services.gateway.errors import ERROR_RESPONSES, ApiError, from_rpc, no_engine

router = APIRouter(tags=["Operations"], responses=ERROR_RESPONSES)

_TIMEOUT_SECONDS = 5.0
# For this many seconds, all open pages get the same answer, so that many pages cause no more reads than one page.
_FRESH_SECONDS = 1.0
# UNIMPLEMENTED is the answer of engines of earlier versions, which lack the call GetProgress.
_NOT_FOUND = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)


class ProgressReader:
    """Reads the progress of the training from an engine, at most once in :data:`_FRESH_SECONDS`."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._read_at = float("-inf")
        self._answer: dict[str, Any] | ApiError = no_engine()

    async def read(self, pool: EnginePool) -> dict[str, Any]:
        """Returns the progress as JSON values.

        Raises ApiError: 404 if the store has no progress, or if the engine that was asked is of an earlier version that
        cannot read it; 503 or another status if no engine answers the request.
        """
        async with self._lock:
            if time.monotonic() - self._read_at >= _FRESH_SECONDS:
                try:
                    self._answer = await self._ask(pool)
                except ApiError as error:
                    self._answer = error
                self._read_at = time.monotonic()
        if isinstance(self._answer, ApiError):
            raise self._answer.with_traceback(None)
        return self._answer

    async def _ask(self, pool: EnginePool) -> dict[str, Any]:
        """Ask one engine after another, healthy ones first. An engine answers even before it has a model."""
        failure = no_engine()
        for replica in pool.reachable():
            try:
                request = engine_pb2.GetProgressRequest()
                progress = await replica.stub.GetProgress(request, timeout=_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() in _NOT_FOUND:
                    raise ApiError(
                        404, "The training of this model left no progress.", code="progress_not_found"
                    ) from error
                failure = from_rpc(error, started=False)
                continue
            parts = json.loads(progress.parts_json)
            return {
                "model": progress.model,
                "promoted": progress.promoted or None,
                "served": progress.served or None,
                "age_seconds": round(progress.age_seconds, 1),
                "run": parts.pop("run", None),
                "stages": parts,
            }
        raise failure


async def _reader(request: Request) -> ProgressReader:
    return cast(ProgressReader, request.app.state.progress)


@router.get("/progress", summary="How far the model's training has come")
async def progress(pool: PoolDep, reader: Annotated[ProgressReader, Depends(_reader)]) -> dict[str, Any]:
    """The progress that the training writes to the store, even while no model is loaded.

    `run` has the stages of the pipeline (null if a stage was started alone), and `stages` has the steps, loss curve,
    held-out metrics and answers of each training stage. `served` is the revision that answers new requests now. While
    `promoted` is null, the served revision is a snapshot: a checkpoint that is not promoted. `age_seconds` is 0 while a
    program works on the model; afterwards, it is the time since the last progress was written.
    """
    return await reader.read(pool)
