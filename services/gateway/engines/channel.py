"""The one place in which the gateway opens connections to engines."""

import grpc

from nanochat_core.discovery import Endpoint
from services.gateway.settings import GatewaySettings


def open_channel(endpoint: Endpoint, settings: GatewaySettings) -> grpc.aio.Channel:
    """Returns a channel to one engine. It connects with the first call, and again after each loss."""
    return grpc.aio.insecure_channel(
        endpoint.address,
        options=[
            # Keepalive pings find out that a machine is gone while the gateway waits for an answer from it.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            # gRPC waits up to two minutes between attempts by default; an engine that is back should serve at once.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.min_reconnect_backoff_ms", int(settings.connect_timeout_seconds * 1000)),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
        ],
    )
