"""`/status`: the current state of the engines and of this gateway, for operators whose key has the scope `admin`."""

import dataclasses
from typing import Any

from fastapi import APIRouter, Request, Response

from services.gateway.admission.keys import Limits
from services.gateway.api.dependencies import DrainDep, PoolDep
from services.gateway.api.web_page import built_page
from services.gateway.engines.replica import Replica
from services.gateway.errors import ERROR_RESPONSES
from services.gateway.metrics import Metrics

router = APIRouter(tags=["Administration"], responses=ERROR_RESPONSES)

# Maps the name of each counter in the answer of /admin/status to the name of the gateway's metric.
_METRICS = {
    "requests_in_flight": "requests_in_flight",
    "queue_length": "queue_length",
    "prompt_tokens": "prompt_tokens_total",
    "cached_prompt_tokens": "cached_prompt_tokens_total",
    "generation_tokens": "generation_tokens_total",
    "streams_lost": "streams_lost_total",
}


@router.get("/status", include_in_schema=False)
async def page(pool: PoolDep) -> Response:
    """Returns the page that shows `/admin/status`. The page contains no data, so everyone may load it."""
    return built_page(pool.settings.static_dir, "status.html")


@router.get("/admin/status", summary="What the engines and this gateway do now")
async def status(request: Request, pool: PoolDep, drain: DrainDep) -> dict[str, Any]:
    """The engines as of their last check, and the counters of this gateway since its start.

    `limits` are the limits of the gateway; a key may have limits of its own. `kv_use` is the used share of the KV
    cache, 0 to 1.
    """
    settings = pool.settings
    limits = Limits(settings.requests_per_minute, settings.tokens_per_minute, settings.parallel_answers)
    return {
        "engines": [_engine(replica) for replica in pool.replicas()],
        "gateway": _counters(request.app.state.metrics) | {"draining": drain.draining},
        "limits": dataclasses.asdict(limits),
    }


def _engine(replica: Replica) -> dict[str, Any]:
    load, info = replica.reported, replica.model and replica.model.info
    return {
        "address": replica.address,
        "up": replica.up,
        "why_down": "it is no longer in the settings or in the DNS" if replica.leaving else replica.why_down,
        "model": info and info.name,
        "revision": info and info.revision,
        "context_length": info and info.context_length,
        "parameters": info and info.parameters,
        "running": load.running,
        "waiting": load.waiting,
        "parked": load.parked,
        "waiting_tokens": load.waiting_tokens,
        "kv_use": replica.load.kv_used,
    }


def _counters(metrics: Metrics) -> dict[str, float]:
    read = metrics.registry.get_sample_value
    return {name: read(f"nanochat_gateway_{metric}") or 0.0 for name, metric in _METRICS.items()}
