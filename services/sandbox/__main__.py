"""``python -m services.sandbox``: serves the sandbox over gRPC, and gives running calls time to finish at the end."""

import asyncio
import logging
import os

from nanochat_core import logs, settings
from nanochat_core.errors import run_main
from nanochat_core.grpc_service import GrpcService
from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.sandbox import SandboxExecutor, WorkerFailed
from services.sandbox.metrics import Metrics
from services.sandbox.servicer import SandboxServicer
from services.sandbox.settings import SandboxSettings

PROGRAM = "python -m services.sandbox"
SERVICE = sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"].full_name
_MESSAGE_OVERHEAD = 64 << 10
# Time after the drain for replies that are still being sent.
_LAST_REPLY_SECONDS = 0.2

log = logging.getLogger("nanochat.sandbox")


def main() -> None:
    chosen = settings.load(SandboxSettings, prefix="NANOCHAT_SANDBOX", program=PROGRAM)
    logs.configure("sandbox", chosen.log_level)
    log.info("starting", extra={"settings": settings.describe(chosen)})
    if os.geteuid() == 0:
        log.warning("running as root: code is isolated, but an unprivileged user would add one more layer of isolation")
    with SandboxExecutor(chosen) as executor:
        log.info(
            "isolation profile chosen",
            extra={
                "profile": executor.profile,
                "asked_for": chosen.profile,
                "landlock_abi": executor.landlock_abi,
                "own_file_systems": executor.own_file_systems,
                "passed_over": executor.rejected,
            },
        )
        asyncio.run(serve(chosen, executor))
    log.info("stopped")


async def serve(config: SandboxSettings, executor: SandboxExecutor) -> None:
    """Serves until SIGTERM or SIGINT. Then refuses new calls, and closes ``executor`` when the running calls end.

    After ``config.drain_seconds``, calls that still run are killed.
    """
    service = GrpcService(
        SERVICE,
        config,
        max_receive_bytes=config.max_code_bytes + config.max_file_bytes + _MESSAGE_OVERHEAD,
        # A reply contains three outputs: stdout, stderr and the result. Each invalid byte in an output is replaced by a
        # character that needs three bytes in UTF-8, so an output grows at most by the factor 3. Three such outputs need
        # the factor 9.
        max_send_bytes=9 * config.max_output_bytes + config.max_file_bytes + _MESSAGE_OVERHEAD,
    )
    metrics = Metrics(executor)
    servicer = SandboxServicer(executor, metrics, config.max_code_bytes)
    sandbox_pb2_grpc.add_SandboxServicer_to_server(servicer, service.server)
    await service.start(metrics.registry)
    await service.announce_ready(log, profile=executor.profile)
    probing = asyncio.create_task(_probe(service, executor, config.probe_seconds))
    await service.stop_requested.wait()
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    log.info("draining", extra={"running": executor.stats.running, "drain_seconds": config.drain_seconds})
    await service.set_serving(False)
    await servicer.drain(config.drain_seconds)
    await service.close(_LAST_REPLY_SECONDS)


async def _probe(service: GrpcService, executor: SandboxExecutor, seconds: float) -> None:
    """Make a test call every ``seconds`` seconds, and repeat a failed test call at once.

    The health service reports NOT_SERVING after two failures in a row, until a test call succeeds.
    """
    serving = True
    while True:
        await asyncio.sleep(seconds)
        # A failed test call is repeated once before it counts, because the cause may only be that something killed the
        # call's process.
        problem = await _problem(executor) and await _problem(executor)
        if serving == bool(problem):
            serving = not problem
            await service.set_serving(serving)
            if problem:
                log.error("the sandbox does not work", extra={"error": problem})
            else:
                log.info("the sandbox works again")


async def _problem(executor: SandboxExecutor) -> str:
    """Make a test call and return why it failed; empty if it succeeded."""
    try:
        await executor.probe()
    except WorkerFailed as error:
        return str(error)
    except Exception as error:  # the error is caught, so that the test calls go on
        log.exception("a test call raised an unexpected error")
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    run_main(main, PROGRAM)
