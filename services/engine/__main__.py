"""``python -m services.engine``: serves a model over gRPC."""

import asyncio
import logging
import os
import threading

from nanochat_core import logs, settings
from nanochat_core.daemon_threads import DAEMON_WORK
from nanochat_core.device import prepare_cpu
from nanochat_core.engine.async_engine import DEVICE_LOOP
from nanochat_core.errors import run_main
from nanochat_core.garbage import leave_out_imports
from services.engine.server import serve
from services.engine.settings import EngineSettings

PROGRAM = "python -m services.engine"

log = logging.getLogger("nanochat.engine")


def main() -> int:
    chosen = settings.load(EngineSettings, prefix="NANOCHAT_ENGINE", program=PROGRAM)
    logs.configure("engine", chosen.log_level)
    log.info("starting", extra={"settings": settings.describe(chosen)})
    prepare_cpu(chosen.threads)
    leave_out_imports()
    code = asyncio.run(serve(chosen))
    log.info("stopped", extra={"exit_code": code})
    return code


if __name__ == "__main__":
    try:
        run_main(main, PROGRAM)
    except SystemExit as end:
        if any(thread.name in (DAEMON_WORK, DEVICE_LOOP) for thread in threading.enumerate()):
            # If a thread still computes, Python's normal exit would end the process with SIGABRT, so ``os._exit`` ends
            # the process without Python's cleanup.
            logging.shutdown()
            os._exit(int(end.code or 0))
        raise
