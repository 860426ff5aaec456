"""Runs the gateway as a process: opens the listening socket, handles signals and shuts down."""

import asyncio
import contextlib
import functools
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from typing import cast

import uvicorn
from fastapi import FastAPI

from nanochat_core.errors import UserError
from services.gateway.connection import Connection
from services.gateway.https import https_context
from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

# Load balancers keep idle connections for about a minute; the server must not close a connection before they do.
_KEEP_ALIVE_SECONDS = 75
# Time to close connections after the drain, when no answer runs any more.
_CLOSE_SECONDS = 5
# Number of open files besides the connections of clients: libraries, logs, connections to engines.
_OTHER_FILES = 256


class Server(uvicorn.Server):
    """A uvicorn server that logs when it is ready, and gives running answers time to finish before it stops."""

    def __init__(self, app: FastAPI, settings: GatewaySettings) -> None:
        """Raises UserError if the settings name a certificate that cannot be used."""
        connection = functools.partial(Connection, settings=settings, metrics=app.state.metrics)
        context = https_context(settings)
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(type[asyncio.Protocol], connection),
                h11_max_incomplete_event_size=settings.max_header_bytes,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
                ssl_context_factory=(lambda *_: context) if context else None,
            )
        )
        self._app = app
        self._drain_seconds = settings.drain_seconds
        self._shutdown: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Logs the event ``ready`` once the server accepts connections. Raises SystemExit if the app cannot start."""
        await super().startup(sockets)
        if not self.started:
            # Some versions of uvicorn, such as 0.34, return here, and the process would end with exit code 0. Other
            # versions raise SystemExit themselves. The log already has the app's error.
            raise SystemExit(1)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            logger.info("ready", extra={"address": address, "metrics_address": address})

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Makes SIGTERM and SIGINT drain the server. A second signal stops the server immediately.

        The process ends with exit code 0 in both cases; uvicorn's own handlers would raise the signal again.
        """
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_signal)
                stack.callback(loop.remove_signal_handler, number)
            yield

    def _on_signal(self) -> None:
        if self._shutdown is None:
            self._shutdown = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        logger.info("draining", extra={"seconds": self._drain_seconds})
        cut = await self._app.state.drain.finish(self._drain_seconds)
        logger.info("drained", extra={"answers_cut": cut})
        self.should_exit = True


def allow_files(connections: int) -> None:
    """Raises the soft limit of open files to ``connections + 256``, or to the hard limit if that is lower.

    A soft limit that is high enough already stays unchanged.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on the address, or raises a UserError if the address is unusable."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        message = f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        raise UserError(message) from error
    # Connections inherit this option. Without it, the end of an answer waits until the client has acknowledged what
    # came before, which may take 40 ms. uvloop always sets the option; asyncio's own loop does not for this socket.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
