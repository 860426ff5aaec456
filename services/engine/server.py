"""Runs the engine service: serves a model over gRPC, and gives running answers time to finish before it ends."""

import asyncio
import contextlib
import faulthandler
import logging

from nanochat_core.grpc_service import GrpcService
from nanochat_core.protos import engine_pb2, engine_pb2_grpc
from services.engine.metrics import Metrics
from services.engine.model_host import ModelHost, ServedModel
from services.engine.model_loader import ModelLoader
from services.engine.sandbox_client import SandboxClient
from services.engine.servicer import EngineServicer
from services.engine.settings import EngineSettings

log = logging.getLogger("nanochat.engine")

SERVICE = engine_pb2.DESCRIPTOR.services_by_name["Engine"].full_name
# Maximum sizes of a request and of a reply. A request contains a prompt, perhaps a JSON schema, and the earlier tokens
# of each continued choice; a token takes up to 8 bytes. A reply may contain a tokenizer as JSON, which takes a few MiB
# for 100,000 entries.
_MAX_RECEIVE_BYTES, _MAX_SEND_BYTES = 16 << 20, 64 << 20
_HANG_CHECK_SECONDS = 1.0
EXIT_DEVICE_LOOP_DIED = 70


async def serve(settings: EngineSettings) -> int:
    """Serve until SIGTERM or SIGINT, then let running answers finish for up to ``settings.drain_seconds``.

    The port is open from the start. gRPC's health service reports SERVING once a model is loaded. Returns the exit code
    of the process: 0, or :data:`EXIT_DEVICE_LOOP_DIED` if a device loop has died or hangs. Raises the error of the
    first model if it cannot be loaded.
    """
    service = GrpcService(SERVICE, settings, max_receive_bytes=_MAX_RECEIVE_BYTES, max_send_bytes=_MAX_SEND_BYTES)
    sandbox = None
    if settings.sandbox_address:
        sandbox = SandboxClient(settings.sandbox_address, service.tls, on_retry=lambda: metrics.tool_retried())
    model_loaded, loop_died = asyncio.Event(), asyncio.Event()

    def model_changed(model: ServedModel) -> None:
        metrics.model(model.ref.model, model.ref.revision, model.info.compute_dtype)
        model_loaded.set()

    metrics = Metrics(lambda: host.load(), (lambda: sandbox.serving) if sandbox else None)
    loader = ModelLoader(settings, tool_runner=sandbox, observer=metrics)
    host = ModelHost(
        loader, retire_seconds=settings.retire_seconds, on_change=model_changed, on_loop_death=loop_died.set
    )
    servicer = EngineServicer(host, loader.store, metrics)
    engine_pb2_grpc.add_EngineServicer_to_server(servicer, service.server)
    await service.start(metrics.registry)

    async def announce() -> None:
        await model_loaded.wait()
        await service.announce_ready(log)

    following = asyncio.create_task(host.follow(settings.poll_seconds))
    announcing = asyncio.create_task(announce())
    watching = asyncio.create_task(_report_hang(host, settings.hang_seconds, loop_died))
    ends = [asyncio.create_task(event.wait()) for event in (service.stop_requested, loop_died)]
    try:
        await asyncio.wait({following, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()  # raises the error that ended the task
        if loop_died.is_set():
            log.error("ending because the device loop has died")
            return EXIT_DEVICE_LOOP_DIED
        log.info("draining", extra={"drain_seconds": settings.drain_seconds})
        following.cancel()
        announcing.cancel()
        await service.set_serving(False)
        servicer.begin_draining()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(host.drained(), settings.drain_seconds)
        return EXIT_DEVICE_LOOP_DIED if loop_died.is_set() else 0
    finally:
        for task in (following, announcing, watching, *ends):
            task.cancel()
        await host.close()
        await service.close(grace=1.0)
        if sandbox is not None:
            await sandbox.close()


async def _report_hang(host: ModelHost, hang_seconds: float, loop_died: asyncio.Event) -> None:
    """Set ``loop_died`` once an engine step has taken more than ``hang_seconds``; never if ``hang_seconds`` is 0.

    A step counts as hung if two checks in a row find it late. One check is not enough: if the whole process was paused,
    a step can look late although the device is about to finish it.
    """
    late_checks = 0
    while late_checks < 2:
        await asyncio.sleep(_HANG_CHECK_SECONDS)
        late_checks = late_checks + 1 if 0 < hang_seconds < host.longest_step() else 0
    log.error("the device hangs", extra={"step_seconds": round(host.longest_step(), 1)})
    loop_died.set()
    faulthandler.dump_traceback()
