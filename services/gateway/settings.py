"""The gateway's settings."""

import dataclasses
from pathlib import Path
from typing import Literal

from nanochat_core.discovery import LOOKUP_SECONDS, split_target
from nanochat_core.settings import setting
from nanochat_core.tls import TlsSettings
from nanochat_core.tracing.tracer import TracingSettings


@dataclasses.dataclass(frozen=True)
class GatewaySettings(TlsSettings, TracingSettings):
    """Serves an OpenAI-style REST API and the chat page in front of one or more inference engines."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "TCP port to listen on; 0 takes any free one", minimum=0, maximum=65535)
    engine_addresses: tuple[str, ...] = setting(
        ("127.0.0.1:50051",),
        "host:port of the engines, comma separated; each address of a host name is an engine of its own",
    )
    discovery_seconds: float = setting(LOOKUP_SECONDS, "time between two lookups of the engines' names", minimum=0.05)
    model_aliases: tuple[str, ...] = setting(
        (), "further names that requests may use for the served model, comma separated"
    )
    default_temperature: float = setting(
        0.6, "temperature of requests that set none; small models ramble at OpenAI's default of 1", minimum=0, maximum=2
    )
    default_max_tokens: int = setting(
        0, "most tokens of an answer if the request sets no limit; 0 allows the rest of the context", minimum=0
    )
    max_choices: int = setting(8, "most continuations (n times the number of prompts) of one request", minimum=1)
    max_body_bytes: int = setting(1_000_000, "largest accepted request body in bytes", minimum=1024)
    request_timeout_seconds: float = setting(600.0, "longest time an engine may work on one request", minimum=1)
    heartbeat_seconds: float = setting(
        10.0, "seconds of silence after which a stream gets a comment line, so that proxies keep it open", minimum=0.05
    )
    connect_timeout_seconds: float = setting(
        5.0, "longest wait for a connection to an engine and for the description of its model", minimum=0.1
    )
    poll_seconds: float = setting(1.0, "time between two checks of an engine's health and load", minimum=0.05)
    health_timeout_seconds: float = setting(
        1.0, "longest wait for the answer to such a check; an engine that misses two in a row hangs", minimum=0.05
    )
    model_poll_seconds: float = setting(
        5.0, "time between two checks of the model revision that an engine serves", minimum=0.05
    )
    max_engine_sequences: int = setting(
        0, "most answers that this gateway lets run in one engine; 0 leaves the limit to the engine", minimum=0
    )
    queue_size: int = setting(
        1000, "most requests that wait for an engine; further requests get 429, so 0 lets none wait", minimum=0
    )
    queue_seconds: float = setting(
        30.0, "longest time that a request, or a stream that lost its engine, waits for an engine", minimum=0
    )
    max_failures: int = setting(
        4, "failures of engines on one request, without a token in between, after which it is given up", minimum=1
    )
    max_message_bytes: int = setting(
        64 * 1024 * 1024,
        "largest gRPC message from an engine in bytes; one message carries the whole tokenizer",
        minimum=65536,
    )
    drain_seconds: float = setting(
        30.0, "longest time that running answers may take to finish after SIGTERM", minimum=0
    )
    static_dir: str = setting(str(Path(__file__).parent / "static"), "folder with the built web page")
    cors_origins: tuple[str, ...] = setting(
        (), "web origins whose pages may call the API, comma separated; * allows all, empty allows none"
    )
    trace_ratio: float = setting(
        1.0,
        "share of the requests whose trace is exported; if a request brings its own trace, the caller has decided",
        minimum=0,
        maximum=1,
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe event that is logged")

    def __post_init__(self) -> None:
        if not self.engine_addresses:
            raise ValueError("engine_addresses names no engine; give at least one host:port")
        for address in self.engine_addresses:
            split_target(address)
        if len(set(self.engine_addresses)) != len(self.engine_addresses):
            raise ValueError("engine_addresses names an engine twice; each replica needs an address of its own")
