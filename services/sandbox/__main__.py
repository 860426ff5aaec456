"""``python -m services.sandbox``: serves a sandbox executor over gRPC and ends in an orderly way."""

import asyncio
import logging
import os

from nanochat_core import logs, settings
from nanochat_core.errors import run_main
from nanochat_core.grpc_service import GrpcService
from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.sandbox import SandboxExecutor
from services.sandbox.metrics import Metrics
from services.sandbox.servicer import SandboxServicer
from services.sandbox.settings import SandboxSettings

PROGRAM = "python -m services.sandbox"
SERVICE = sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"].full_name
_MESSAGE_OVERHEAD = 64 << 10
# Calls that are interrupted at the end of the drain have this long to send their replies.
_REPLY_SECONDS = 2.0

log = logging.getLogger("nanochat.sandbox")


def main() -> None:
    chosen = settings.load(SandboxSettings, prefix="NANOCHAT_SANDBOX", program=PROGRAM)
    logs.configure("sandbox", chosen.log_level)
    log.info("starting", extra={"settings": settings.describe(chosen)})
    if os.geteuid() == 0:
        log.warning("running as root: the isolation holds, but one layer more would if the service were unprivileged")
    with SandboxExecutor(chosen) as executor:
        log.info(
            "isolation profile chosen",
            extra={
                "profile": executor.profile,
                "asked_for": chosen.profile,
                "landlock_abi": executor.landlock_abi,
                "passed_over": executor.rejected,
            },
        )
        asyncio.run(serve(chosen, executor))
    log.info("stopped")


async def serve(config: SandboxSettings, executor: SandboxExecutor) -> None:
    """Serves until SIGTERM or SIGINT, then refuses new calls, lets running calls finish and closes ``executor``."""
    service = GrpcService(
        SERVICE,
        config,
        max_receive_bytes=config.max_code_bytes + _MESSAGE_OVERHEAD,
        # A reply holds three outputs. An invalid byte is replaced by a character that takes three bytes in UTF-8.
        max_send_bytes=9 * config.max_output_bytes + _MESSAGE_OVERHEAD,
    )
    metrics = Metrics(executor)
    servicer = SandboxServicer(executor, metrics, config.max_code_bytes)
    sandbox_pb2_grpc.add_SandboxServicer_to_server(servicer, service.server)
    await service.start(metrics.registry)
    await service.announce_ready(log, profile=executor.profile)
    await service.stop_requested.wait()
    log.info("draining", extra={"running": executor.stats.running, "drain_seconds": config.drain_seconds})
    await service.set_serving(False)
    closing = asyncio.create_task(service.close(config.drain_seconds + _REPLY_SECONDS))
    await asyncio.wait({closing}, timeout=config.drain_seconds)
    # Closing the executor kills the calls that still run. Their callers get an error with the reason.
    await asyncio.to_thread(executor.close)
    await closing


if __name__ == "__main__":
    run_main(main, PROGRAM)
