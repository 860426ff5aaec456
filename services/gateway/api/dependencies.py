"""The long-lived objects that FastAPI hands to the endpoints."""

from typing import Annotated, cast

from fastapi import Depends, Request

from nanochat_core.sandboxes import Sandboxes
from services.gateway.admission.admission import Admission
from services.gateway.engines.pool import EnginePool
from services.gateway.middleware.drain import Drain


async def _pool(request: Request) -> EnginePool:
    return cast(EnginePool, request.app.state.pool)


async def _sandboxes(request: Request) -> Sandboxes:
    return cast(Sandboxes, request.app.state.sandboxes)


async def _drain(request: Request) -> Drain:
    return cast(Drain, request.app.state.drain)


async def _admission(request: Request) -> Admission:
    return cast(Admission, request.app.state.admission)


PoolDep = Annotated[EnginePool, Depends(_pool)]
AdmissionDep = Annotated[Admission, Depends(_admission)]
SandboxesDep = Annotated[Sandboxes, Depends(_sandboxes)]
DrainDep = Annotated[Drain, Depends(_drain)]
