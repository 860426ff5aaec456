"""Endpoints for Kubernetes and Prometheus."""

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.gateway.api.dependencies import DrainDep, PoolDep
from services.gateway.errors import ERROR_RESPONSES, no_engine, shutting_down

router = APIRouter(tags=["Operations"])


@router.get("/healthz", summary="Is the gateway alive")
async def healthz() -> dict[str, str]:
    """200 as long as the process can answer at all."""
    return {"status": "ok"}


@router.get("/readyz", summary="Can a request be answered", responses=ERROR_RESPONSES)
async def readyz(pool: PoolDep, drain: DrainDep) -> dict[str, Any]:
    """200 while at least one engine is healthy and its model is known; 503 otherwise and during a shutdown."""
    if drain.draining:
        raise shutting_down()
    models = pool.models()
    if not models:
        raise no_engine()
    return {"status": "ready", "models": sorted(models)}


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(pool: PoolDep) -> Response:
    """The metrics in Prometheus's text format."""
    return Response(generate_latest(pool.metrics.registry), media_type=CONTENT_TYPE_LATEST)
