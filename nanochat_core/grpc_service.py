"""The life cycle of every gRPC service: listen, report health, publish metrics, wait for a signal, close.

This module needs grpcio-health-checking and grpcio-reflection. Only services with a gRPC server install them.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from nanochat_core.errors import UserError
from nanochat_core.settings import setting
from nanochat_core.tls import TlsSettings, tls_files
from nanochat_core.tracing.tracer import Tracer, TracingSettings

# Shortest time between two pings that the server permits. Clients ping idle connections to find out whether the service
# still answers. The limit is set, because by default, a gRPC server closes the connection of a client that pings more
# often than every 5 minutes.
_MIN_PING_SECONDS = 10

LIVE = "live"
"""The health service reports SERVING under this name while the process works, with or without a model."""


@dataclasses.dataclass(frozen=True)
class ListenSettings(TlsSettings, TracingSettings):
    """The addresses of a gRPC service. The settings of each gRPC service derive from this class and set its ports."""

    host: str = setting("127.0.0.1", "address to serve gRPC on")
    port: int = setting(0, "port to serve gRPC on; 0 chooses a free port", minimum=0, maximum=65535)
    metrics_host: str = setting("", "address to serve Prometheus metrics on; empty means the same as the host")
    metrics_port: int = setting(
        0, "port to serve Prometheus metrics on; 0 chooses a free port", minimum=0, maximum=65535
    )
    health_port: int = setting(
        0,
        "port of a second health service, never encrypted, for probes without a TLS certificate; 0 opens no such port",
        minimum=0,
        maximum=65535,
    )


class GrpcService:
    """A gRPC server with health checks, reflection, mutual TLS, traces, a port for Prometheus and signal handlers.

    Create it inside a running event loop, add the servicers to :attr:`server`, then call :meth:`start`,
    :meth:`announce_ready`, and :meth:`close` at the end. SIGTERM and SIGINT set the event :attr:`stop_requested`.
    """

    def __init__(self, name: str, settings: ListenSettings, *, max_receive_bytes: int, max_send_bytes: int) -> None:
        """``name`` is the full name of the service in its proto file.

        Raises UserError if the settings name TLS files or an exporter of traces that cannot be used.
        """
        self._name, self._settings = name, settings
        self._tracer = Tracer(name.rpartition(".")[2].lower(), settings)
        self.tls = tls_files(settings)
        self.stop_requested = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop_requested.set)
        self.server = grpc.aio.server(
            interceptors=[_RequestSpans(self._tracer)],
            options=[
                ("grpc.max_receive_message_length", max_receive_bytes),
                ("grpc.max_send_message_length", max_send_bytes),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000 * _MIN_PING_SECONDS),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._watching = asyncio.create_task(self.tls.watch()) if self.tls else None
        self._health_server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._health = health.aio.HealthServicer()
        for server in (self.server, self._health_server):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)

    async def start(self, registry: CollectorRegistry) -> None:
        """Open the ports and publish the metrics of ``registry``. The service is reported as NOT_SERVING at first.

        Raises UserError if the service cannot listen on an address.
        """
        settings = self._settings
        host, metrics_host = settings.host, settings.metrics_host or settings.host
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        await self.set_serving(False)
        address, health_address = f"{host}:{settings.port}", f"{host}:{settings.health_port}"
        try:
            if self.tls:
                bound = self.server.add_secure_port(address, self.tls.server_credentials())
            else:
                bound = self.server.add_insecure_port(address)
        except RuntimeError as error:
            raise UserError(f"cannot serve on {address}: {error}") from error
        if settings.health_port:
            try:
                self._health_server.add_insecure_port(health_address)
            except RuntimeError as error:
                raise UserError(f"cannot serve health on {health_address}: {error}") from error
            await self._health_server.start()
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
        """Report SERVING, and log the event ``ready`` with the addresses, the process id and ``fields``."""
        await self.set_serving(True)
        log.info("ready", extra=self._addresses | {"pid": os.getpid()} | fields)

    async def close(self, grace: float) -> None:
        """Refuse new gRPC calls, give running gRPC calls ``grace`` seconds to finish, and close the ports."""
        if self._watching is not None:
            self._watching.cancel()
        await self.server.stop(grace)
        await self._health_server.stop(0)
        await asyncio.to_thread(self._tracer.close)
        self._metrics_server.shutdown()
        self._metrics_server.server_close()


class _RequestSpans(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc has no types
    """Runs each call in a separate span, except calls of gRPC's own services (health, reflection)."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc."):
            return handler
        name = details.method.removeprefix("/")
        # A span's headers are text, so binary headers, whose values gRPC passes as bytes, are left out.
        headers = {key: value for key, value in details.invocation_metadata if isinstance(value, str)}
        codecs = (handler.request_deserializer, handler.response_serializer)

        async def answer(request: Any, context: Any) -> Any:
            with self._tracer.request(name, headers):
                return await handler.unary_unary(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._tracer.request(name, headers):
                async with contextlib.aclosing(handler.unary_stream(request, context)) as replies:
                    async for reply in replies:
                        yield reply

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, *codecs)
        return grpc.unary_unary_rpc_method_handler(answer, *codecs)
