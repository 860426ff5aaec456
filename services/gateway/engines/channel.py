"""Opens the connections to engines. No other module of the gateway opens connections to engines."""

from nanochat_core.discovery import Endpoint
from nanochat_core.grpc_client import ServiceChannel
from nanochat_core.tls import TlsFiles
from services.gateway.settings import GatewaySettings


def open_channel(endpoint: Endpoint, settings: GatewaySettings, tls: TlsFiles | None = None) -> ServiceChannel:
    """Returns a channel to one engine. The channel connects at the first call, and again after a lost connection."""
    options = [
        # Keepalive pings detect a dead machine while the gateway waits for its answer.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # The pauses between attempts to connect are short, so that a restarted engine soon gets requests. By default,
        # gRPC waits up to two minutes between two attempts.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # gRPC also uses this number as the time limit of an attempt to connect.
        ("grpc.min_reconnect_backoff_ms", int(settings.connect_timeout_seconds * 1000)),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
    ]
    return ServiceChannel(endpoint, tls, options)
