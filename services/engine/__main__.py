"""``python -m services.engine``"""

from __future__ import annotations

import asyncio
import logging
import os

from nanochat_core import logs, settings
from nanochat_core.device import prepare_cpu
from nanochat_core.errors import run_main
from services.engine import threads
from services.engine.server import EXIT_DEVICE_LOOP_DIED, serve
from services.engine.settings import EngineSettings

PROGRAM = "python -m services.engine"

log = logging.getLogger("nanochat.engine")


def main() -> int:
    chosen = settings.load(EngineSettings, prefix="NANOCHAT_ENGINE", program=PROGRAM)
    logs.configure("engine", chosen.log_level)
    log.info("starting", extra={"settings": settings.describe(chosen)})
    prepare_cpu(chosen.threads)
    code = asyncio.run(serve(chosen))
    log.info("stopped", extra={"exit_code": code})
    if threads.any_running() or code == EXIT_DEVICE_LOOP_DIED:
        # Threads that compute or wait for a store would be cut off in the middle of it, with an exit code of their own.
        logging.shutdown()
        os._exit(code)
    return code


if __name__ == "__main__":
    run_main(main, PROGRAM)
