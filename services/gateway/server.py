"""The gateway as a process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from nanochat_core.errors import UserError
from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

# Load balancers keep idle connections for about a minute; the server must not be the first to close one.
_KEEP_ALIVE_SECONDS = 75
# For what is left after the drain: connections that are closed, not answers.
_CLOSE_SECONDS = 5


class Server(uvicorn.Server):
    """Says when it listens, and drains before it stops."""

    def __init__(self, app: FastAPI, settings: GatewaySettings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        self._app = app
        self._drain_seconds = settings.drain_seconds
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Log the event ``ready`` once connections are accepted."""
        await super().startup(sockets)
        address = _text(sockets[0]) if sockets else ""
        logger.info("ready", extra={"address": address, "metrics_address": address})

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT drain; a second one stops at once. Either way the process ends with 0."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._ending is not None:
            self.should_exit = self.force_exit = True
            return
        self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        logger.info("draining", extra={"seconds": self._drain_seconds})
        cut = await self._app.state.drain.finish(self._drain_seconds)
        logger.info("drained", extra={"answers_cut": cut})
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound but doesn't accept yet.

    Raises:
        UserError: the address can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from error


def _text(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
