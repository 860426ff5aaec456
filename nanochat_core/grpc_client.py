"""Channels to other services. They use mutual TLS if TLS files are given, and send the request's id and trace.

This module needs only grpcio, so every service can import it.
"""

import asyncio
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import grpc

from nanochat_core.discovery import Endpoint
from nanochat_core.tls import Identity, TlsFiles, client_credentials
from nanochat_core.tracing.span import current_span


class ServiceChannel:
    """A channel to one endpoint. The stubs that protoc generates accept it.

    New calls use the newest TLS files. Calls that began with older files finish on their old connection.
    """

    def __init__(
        self, endpoint: Endpoint, tls: TlsFiles | None = None, options: Sequence[tuple[str, Any]] = ()
    ) -> None:
        """``options`` are gRPC's channel options. Without ``tls``, the channel is not encrypted.

        The caller must run inside the event loop that will use the channel.
        """
        self._endpoint, self._tls, self._options = endpoint, tls, list(options)
        self._newest: _Connection | None = None
        self._connections: set[_Connection] = set()  # the newest connection, and older open connections
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def unary_unary(self, method: str, **codecs: Any) -> "_Method":
        """The remote method ``method``, which answers with one message. The generated stubs call this function."""
        return _Method(self, "unary_unary", method, codecs)

    def unary_stream(self, method: str, **codecs: Any) -> "_Method":
        """The remote method ``method``, which answers with a stream. The generated stubs call this function."""
        return _Method(self, "unary_stream", method, codecs)

    async def close(self) -> None:
        """Close all connections and cancel the calls that still run. Closing again has no effect."""
        self._closed = True
        await asyncio.gather(*map(self._close, list(self._connections)), *self._closing)

    def connection(self) -> "_Connection":
        """The connection for a new call. Raises :class:`grpc.aio.UsageError` if the channel is closed."""
        if self._closed:
            raise grpc.aio.UsageError(f"the channel to {self._endpoint.address} is closed")
        identity = self._tls.current() if self._tls else None
        if self._newest is None or self._newest.identity is not identity:
            old, self._newest = self._newest, _Connection(self._connect(identity), identity)
            self._connections.add(self._newest)
            if old is not None:
                self.close_if_unused(old)
        return self._newest

    def close_if_unused(self, connection: "_Connection") -> None:
        """Close a connection after its last call if a newer connection has replaced it."""
        if connection is not self._newest and connection.calls == 0 and not self._closed:
            task = asyncio.get_running_loop().create_task(self._close(connection))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, connection: "_Connection") -> None:
        await connection.channel.close()
        self._connections.discard(connection)

    def _connect(self, identity: Identity | None) -> Any:
        if identity is None:
            return grpc.aio.insecure_channel(self._endpoint.address, options=self._options)
        # The certificate is checked against the name that was looked up, because it is not valid for the numeric
        # address to which the channel connects.
        name = ("grpc.ssl_target_name_override", self._endpoint.host)
        credentials = client_credentials(identity)
        return grpc.aio.secure_channel(self._endpoint.address, credentials, options=[*self._options, name])


@dataclasses.dataclass(eq=False)
class _Connection:
    """A gRPC channel that uses one TLS identity, and the number of its running calls."""

    channel: Any
    identity: Identity | None
    methods: dict[str, Any] = dataclasses.field(default_factory=dict)
    calls: int = 0


class _Method:
    """One method of a service. Each call goes over the newest connection of the channel."""

    def __init__(self, channel: ServiceChannel, kind: str, name: str, codecs: dict[str, Any]) -> None:
        self._channel, self._kind, self._name, self._codecs = channel, kind, name, codecs

    def __call__(self, request: Any = None, *, metadata: Iterable[tuple[str, str]] = (), **options: Any) -> Any:
        """Start a call and return the call object of :mod:`grpc.aio`, to which ``options`` are passed.

        The call's headers are those of the current span, and ``metadata``. If both contain the same header, the value
        in ``metadata`` takes precedence.
        """
        connection = self._channel.connection()
        method = connection.methods.get(self._name)
        if method is None:
            method = connection.methods[self._name] = getattr(connection.channel, self._kind)(
                self._name, **self._codecs
            )
        span = current_span.get()
        headers = (span.headers() if span else {}) | dict(metadata)
        call = method(request, metadata=tuple(headers.items()) or None, **options)
        connection.calls += 1
        call.add_done_callback(lambda _: self._ended(connection))
        return call

    def _ended(self, connection: _Connection) -> None:
        connection.calls -= 1
        self._channel.close_if_unused(connection)
