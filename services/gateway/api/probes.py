"""Endpoints for Kubernetes and Prometheus."""

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.gateway.api.dependencies import DrainDep, PoolDep
from services.gateway.errors import ERROR_RESPONSES, shutting_down

router = APIRouter(tags=["Operations"])


@router.get("/healthz", summary="Is the gateway alive")
async def healthz() -> dict[str, str]:
    """200 as long as the process can answer at all."""
    return {"status": "ok"}


@router.get("/readyz", summary="Does the gateway take requests", responses=ERROR_RESPONSES)
async def readyz(pool: PoolDep, drain: DrainDep) -> dict[str, Any]:
    """200 until the shutdown begins, then 503. Without an engine, requests wait.

    `models` lists the models that engines serve now. While the list is empty, `waits_for` says what is missing.
    """
    if drain.draining:
        raise shutting_down()
    return {"status": "ready", "models": sorted(pool.models()), "waits_for": pool.waits_for()}


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(pool: PoolDep) -> Response:
    """The metrics in Prometheus's text format."""
    return Response(generate_latest(pool.metrics.registry), media_type=CONTENT_TYPE_LATEST)
