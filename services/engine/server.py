"""The engine's process: model, gRPC server, metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2, engine_pb2_grpc
from services.engine.metrics import Metrics
from services.engine.model_host import ModelHost, ServedModel
from services.engine.sandbox_client import SandboxClient
from services.engine.servicer import EngineServicer
from services.engine.settings import EngineSettings

log = logging.getLogger("nanochat.engine")

SERVICE = engine_pb2.DESCRIPTOR.services_by_name["Engine"].full_name
# Health by this name says that the process works, whether or not it has a model yet or takes requests still.
LIVE = "live"
# Requests are a prompt of at most the context length and perhaps a schema; answers may be a tokenizer of 100,000
# entries, a few MiB of JSON.
_RECEIVED_BYTES, _SENT_BYTES = 4 << 20, 64 << 20
_WATCH_SECONDS = 1.0
# Clients may ask this often whether the connection still lives.
_PING_MILLISECONDS = 10_000
EXIT_DEVICE_LOOP_DIED = 70


async def serve(settings: EngineSettings) -> int:
    """Serve until SIGTERM or SIGINT, then let running answers finish; the exit code.

    The port is open from the start, and health says SERVING once a model is loaded.

    Raises:
        UserError: an address cannot be served on, or the first model cannot be loaded.
    """
    stop, died = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", _RECEIVED_BYTES),
            ("grpc.max_send_message_length", _SENT_BYTES),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_MILLISECONDS),
            ("grpc.so_reuseport", 0),
        ]
    )
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    await status.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
    await _set_health(status, health_pb2.HealthCheckResponse.NOT_SERVING)
    sandbox = SandboxClient(settings.sandbox_address) if settings.sandbox_address else None
    loaded = asyncio.Event()

    def changed(model: ServedModel) -> None:
        metrics.model(model.ref.model, model.ref.revision, model.info.compute_dtype)
        loaded.set()

    metrics = Metrics(lambda: host.load())
    host = ModelHost(settings, tool_runner=sandbox, observer=metrics, on_change=changed, on_death=died.set)
    servicer = EngineServicer(host, metrics)
    engine_pb2_grpc.add_EngineServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    address = f"{settings.host}:{settings.port}"
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise UserError(f"cannot serve on {address}: {error}") from error
    metrics_host = settings.metrics_host or settings.host
    try:
        scraped, _ = start_http_server(settings.metrics_port, metrics_host, registry=metrics.registry)
    except OSError as error:
        raise UserError(f"cannot serve metrics on {metrics_host}:{settings.metrics_port}: {error}") from error
    await server.start()

    async def announce() -> None:
        await loaded.wait()
        await _set_health(status, health_pb2.HealthCheckResponse.SERVING)
        log.info(
            "ready",
            extra={
                "address": f"{settings.host}:{port}",
                "metrics_address": f"{metrics_host}:{scraped.server_port}",
                "pid": os.getpid(),
            },
        )

    following = asyncio.create_task(host.follow())
    announcing = asyncio.create_task(announce())
    watching = asyncio.create_task(_watch(host, settings.hang_seconds, died))
    ends: list[asyncio.Task[bool]] = [asyncio.create_task(stop.wait()), asyncio.create_task(died.wait())]
    try:
        await asyncio.wait({following, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()  # raises what went wrong
        if died.is_set():
            log.error("ending because the device loop has died")
            return EXIT_DEVICE_LOOP_DIED
        log.info("draining", extra={"drain_seconds": settings.drain_seconds})
        servicer.draining = True
        following.cancel()
        announcing.cancel()
        await _set_health(status, health_pb2.HealthCheckResponse.NOT_SERVING)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(host.drained(), settings.drain_seconds)
        return EXIT_DEVICE_LOOP_DIED if died.is_set() else 0
    finally:
        for task in (following, announcing, watching, *ends):
            task.cancel()
        await host.close()
        await server.stop(grace=1.0)
        if sandbox is not None:
            await sandbox.close()
        scraped.shutdown()
        scraped.server_close()


async def _watch(host: ModelHost, hang_seconds: float, died: asyncio.Event) -> None:
    """Say that the device loop has died when it has hung for too long.

    It is looked at twice, because after a pause of the whole process a step is late that will soon be done.
    """
    late = 0
    while late < 2:
        await asyncio.sleep(_WATCH_SECONDS)
        late = late + 1 if 0 < hang_seconds < host.longest_step() else 0
    log.error("the device hangs", extra={"step_seconds": round(host.longest_step(), 1)})
    died.set()
    faulthandler.dump_traceback()


async def _set_health(status: health.aio.HealthServicer, value: int) -> None:
    for name in ("", SERVICE):
        await status.set(name, value)
