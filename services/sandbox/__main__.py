"""``python -m services.sandbox``"""

import asyncio
import logging
import os

from nanochat_core import logs, settings
from nanochat_core.errors import run_main
from nanochat_core.sandbox import SandboxExecutor
from services.sandbox.server import serve
from services.sandbox.settings import SandboxSettings

PROGRAM = "python -m services.sandbox"

log = logging.getLogger("nanochat.sandbox")


def main() -> int:
    chosen = settings.load(SandboxSettings, prefix="NANOCHAT_SANDBOX", program=PROGRAM)
    logs.configure("sandbox", chosen.log_level)
    log.info("starting", extra={"settings": settings.describe(chosen)})
    if os.geteuid() == 0:
        log.warning("running as root: the isolation holds, but one layer more would if the service were unprivileged")
    with SandboxExecutor(chosen.executor_config()) as executor:
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
    return 0


if __name__ == "__main__":
    run_main(main, PROGRAM)
