"""The long-lived objects that FastAPI hands to the endpoints."""

from typing import Annotated, cast

from fastapi import Depends, Request

from services.gateway.engines.pool import EnginePool
from services.gateway.middleware.drain import Drain


async def _pool(request: Request) -> EnginePool:
    return cast(EnginePool, request.app.state.pool)


async def _drain(request: Request) -> Drain:
    return cast(Drain, request.app.state.drain)


PoolDep = Annotated[EnginePool, Depends(_pool)]
DrainDep = Annotated[Drain, Depends(_drain)]
