"""The life cycle of every gRPC service: listen, report health, publish metrics, wait for a signal, close.

This module needs grpcio-health-checking and grpcio-reflection. Only services with a gRPC server install them.
"""

import asyncio
import dataclasses
import logging
import os
import signal

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from nanochat_core.errors import UserError
from nanochat_core.settings import setting

LIVE = "live"
"""The health service reports SERVING under this name while the process works, with or without a model."""


@dataclasses.dataclass(frozen=True)
class ListenSettings:
    """The addresses of a service. Each service's own settings derive from this class and give the default ports."""

    host: str = setting("127.0.0.1", "address to serve gRPC on")
    port: int = setting(0, "port to serve gRPC on; 0 takes any free one", minimum=0, maximum=65535)
    metrics_host: str = setting("", "address to serve Prometheus metrics on; empty means the same as the host")
    metrics_port: int = setting(
        0, "port to serve Prometheus metrics on; 0 takes any free one", minimum=0, maximum=65535
    )


class GrpcService:
    """A gRPC server with health checks, reflection, a port for Prometheus and signal handlers.

    Create it inside a running event loop, add the servicers to :attr:`server`, then call :meth:`start`,
    :meth:`announce_ready`, and :meth:`close` at the end. SIGTERM and SIGINT set the event :attr:`stop_requested`.
    """

    def __init__(self, name: str, *, max_receive_bytes: int, max_send_bytes: int, min_ping_seconds: int = 300) -> None:
        """``name`` is the full name of the service in its proto file.

        ``min_ping_seconds`` is the shortest time between two pings of an idle client; the default is gRPC's.
        """
        self._name = name
        self.stop_requested = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop_requested.set)
        self.server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_receive_bytes),
                ("grpc.max_send_message_length", max_send_bytes),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000 * min_ping_seconds),
                ("grpc.so_reuseport", 0),
            ]
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)

    async def start(self, settings: ListenSettings, registry: CollectorRegistry) -> None:
        """Open both ports and publish the metrics of ``registry``. Health reports NOT_SERVING at first.

        Raises UserError if the service cannot listen on an address.
        """
        host, metrics_host = settings.host, settings.metrics_host or settings.host
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        await self.set_serving(False)
        try:
            bound = self.server.add_insecure_port(f"{host}:{settings.port}")
        except RuntimeError as error:
            raise UserError(f"cannot serve on {host}:{settings.port}: {error}") from error
        try:
            self._metrics_server, _ = start_http_server(settings.metrics_port, metrics_host, registry=registry)
        except OSError as error:
            raise UserError(f"cannot serve metrics on {metrics_host}:{settings.metrics_port}: {error}") from error
        self._addresses = {
            "address": f"{host}:{bound}",
            "metrics_address": f"{metrics_host}:{self._metrics_server.server_port}",
        }
        await self.server.start()

    async def set_serving(self, serving: bool) -> None:
        """Report through the health service whether this service accepts requests."""
        states = health_pb2.HealthCheckResponse
        for name in ("", self._name):
            await self._health.set(name, states.SERVING if serving else states.NOT_SERVING)

    async def announce_ready(self, log: logging.Logger, **fields: object) -> None:
        """Report SERVING, and log the event ``ready`` with both addresses, the process id and ``fields``."""
        await self.set_serving(True)
        log.info("ready", extra=self._addresses | {"pid": os.getpid()} | fields)

    async def close(self, grace: float) -> None:
        """Refuse new gRPC calls, give running gRPC calls ``grace`` seconds to finish, and close both ports."""
        await self.server.stop(grace)
        self._metrics_server.shutdown()
        self._metrics_server.server_close()
