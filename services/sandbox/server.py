"""The sandbox's process: executor, gRPC server, metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from nanochat_core.errors import UserError
from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.sandbox import SandboxExecutor
from services.sandbox.metrics import Metrics
from services.sandbox.servicer import SandboxServicer
from services.sandbox.settings import SandboxSettings

log = logging.getLogger("nanochat.sandbox")

SERVICE = sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"].full_name
_MESSAGE_OVERHEAD = 64 << 10
# For answers to the calls that the end of the drain interrupts.
_ANSWER_SECONDS = 2.0


async def serve(settings: SandboxSettings, executor: SandboxExecutor) -> None:
    """Serve until SIGTERM or SIGINT, then refuse new calls and let running ones finish.

    Args:
        executor: started; closed when this returns.

    Raises:
        UserError: an address cannot be served on.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = Metrics(executor)
    # A reply holds three outputs; invalid bytes in them grow to three each when they are replaced.
    reply_bytes = 9 * settings.max_output_bytes + _MESSAGE_OVERHEAD
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_code_bytes + _MESSAGE_OVERHEAD),
            ("grpc.max_send_message_length", reply_bytes),
            ("grpc.so_reuseport", 0),
        ]
    )
    sandbox_pb2_grpc.add_SandboxServicer_to_server(SandboxServicer(executor, metrics, settings.max_code_bytes), server)
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
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
    for name in ("", SERVICE):
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    log.info(
        "ready",
        extra={
            "address": f"{settings.host}:{port}",
            "metrics_address": f"{metrics_host}:{scraped.server_port}",
            "profile": executor.profile,
            "pid": os.getpid(),
        },
    )
    await stop.wait()
    log.info("draining", extra={"running": executor.stats.running, "drain_seconds": settings.drain_seconds})
    await status.enter_graceful_shutdown()
    stopped = asyncio.ensure_future(server.stop(settings.drain_seconds + _ANSWER_SECONDS))
    await asyncio.wait({stopped}, timeout=settings.drain_seconds)
    # Ends what still runs, so that its callers are told why instead of being cut off.
    await asyncio.to_thread(executor.close)
    await stopped
    scraped.shutdown()
    scraped.server_close()
