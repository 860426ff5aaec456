"""The long-lived objects that FastAPI hands to the endpoints."""

from typing import Annotated

from fastapi import Depends, Request

from services.gateway.engines.routing import EnginePool
from services.gateway.middleware.drain import Drain
from services.gateway.middleware.request_log import RequestRecord


async def _pool(request: Request) -> EnginePool:
    pool: EnginePool = request.app.state.pool
    return pool


async def _drain(request: Request) -> Drain:
    drain: Drain = request.app.state.drain
    return drain


async def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


PoolDep = Annotated[EnginePool, Depends(_pool)]
DrainDep = Annotated[Drain, Depends(_drain)]
RecordDep = Annotated[RequestRecord, Depends(_record)]
