"""The process of the sandbox service: the gRPC server around an executor, and its orderly end."""

import asyncio
import logging

from nanochat_core.grpc_service import GrpcService
from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.sandbox import SandboxExecutor
from services.sandbox.metrics import Metrics
from services.sandbox.servicer import SandboxServicer
from services.sandbox.settings import SandboxSettings

log = logging.getLogger("nanochat.sandbox")

SERVICE = sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"].full_name
_MESSAGE_OVERHEAD = 64 << 10
# The calls that the end of the drain interrupts get this long to send their replies.
_REPLY_SECONDS = 2.0


async def serve(settings: SandboxSettings, executor: SandboxExecutor) -> None:
    """Serve until SIGTERM or SIGINT, then refuse new calls and let running calls finish.

    Args:
        settings: addresses, sizes and times.
        executor: a started executor; it is closed when this function returns.

    Raises:
        UserError: an address cannot be served on.
    """
    service = GrpcService(
        SERVICE,
        max_receive_bytes=settings.max_code_bytes + _MESSAGE_OVERHEAD,
        # A reply holds three outputs. The replacement of an invalid byte takes three bytes in UTF-8.
        max_send_bytes=9 * settings.max_output_bytes + _MESSAGE_OVERHEAD,
    )
    metrics = Metrics(executor)
    servicer = SandboxServicer(executor, metrics, settings.max_code_bytes)
    sandbox_pb2_grpc.add_SandboxServicer_to_server(servicer, service.server)
    await service.start(settings, metrics.registry)
    await service.announce_ready(log, profile=executor.profile)
    await service.stop_requested.wait()
    log.info("draining", extra={"running": executor.stats.running, "drain_seconds": settings.drain_seconds})
    await service.set_serving(False)
    closing = asyncio.create_task(service.close(settings.drain_seconds + _REPLY_SECONDS))
    await asyncio.wait({closing}, timeout=settings.drain_seconds)
    # Closing the executor kills the calls that still run, so that their callers get an error with the reason.
    await asyncio.to_thread(executor.close)
    await closing
