"""Endpoints for Kubernetes and Prometheus."""

import importlib.metadata
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.gateway.api.dependencies import DrainDep, PoolDep
from services.gateway.errors import ERROR_RESPONSES, shutting_down

router = APIRouter(tags=["Operations"])

try:
    _VERSION = importlib.metadata.version("nanochat")
except importlib.metadata.PackageNotFoundError:  # the repository runs without being installed
    _VERSION = "source"


@router.get("/health", include_in_schema=False)
@router.get("/healthz", summary="Is the gateway alive")
async def healthz() -> dict[str, str]:
    """The status is 200 as long as the process can answer at all."""
    return {"status": "ok"}


@router.get("/version", summary="The version of nanochat")
async def version() -> dict[str, str]:
    """The version of the installed package, such as `0.1.0`; `source` if the package is not installed."""
    return {"version": _VERSION}


@router.get("/readyz", summary="Does the gateway accept requests", responses=ERROR_RESPONSES)
async def readyz(pool: PoolDep, drain: DrainDep) -> dict[str, Any]:
    """The status is 200 until the shutdown begins, then 503. The status is 200 even without an engine, because requests
    then wait for an engine.

    `models` lists the models that engines serve now. While the list is empty, `waits_for` says what is missing.
    """
    if drain.draining:
        raise shutting_down()
    waits_for = pool.waits_for()
    if waits_for is not None and pool.settings.waiting_hint:
        waits_for += f" {pool.settings.waiting_hint}"
    return {"status": "ready", "models": sorted(pool.models()), "waits_for": waits_for}


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(pool: PoolDep) -> Response:
    """The metrics in Prometheus's text format."""
    return Response(generate_latest(pool.metrics.registry), media_type=CONTENT_TYPE_LATEST)
