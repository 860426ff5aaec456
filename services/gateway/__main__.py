"""``python -m services.gateway``: serves the REST API and the chat page."""

import logging

from nanochat_core import logs, settings
from nanochat_core.errors import run_main
from nanochat_core.garbage import leave_out_imports
from services.gateway.app import create_app
from services.gateway.server import Server, allow_files, listen
from services.gateway.settings import GatewaySettings

_PROGRAM = "python -m services.gateway"


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    config = settings.load(GatewaySettings, prefix="NANOCHAT_GATEWAY", program=_PROGRAM)
    logs.configure("gateway", config.log_level)
    # Of uvicorn's log events, only errors are logged, because the gateway itself logs its start and counts malformed
    # requests.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    logging.getLogger(__name__).info("starting", extra={"settings": settings.describe(config)})
    allow_files(config.max_connections)
    listener = listen(config.host, config.port)
    server = Server(create_app(config), config)
    leave_out_imports()
    server.run(sockets=[listener])


if __name__ == "__main__":
    run_main(main, _PROGRAM)
