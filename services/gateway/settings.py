"""The gateway's settings."""

import dataclasses
from pathlib import Path
from typing import Literal

from nanochat_core.discovery import LOOKUP_SECONDS, split_target
from nanochat_core.settings import setting
from nanochat_core.tls import TlsSettings
from nanochat_core.tracing.tracer import TracingSettings

# Largest limit that a caller may have. The arithmetic of the limits is exact up to this value (admission/buckets.py).
MAX_LIMIT = 10_000_000


@dataclasses.dataclass(frozen=True)
class KeyStoreSettings:
    """Settings that say where API keys and their usage are stored, for the gateway and for ``nanochat keys``."""

    redis_url: str = setting(
        "",
        "URL of the Redis that keeps keys, usage and limits for all gateways: "
        "redis://[user:password@]host:port/database, or rediss:// for TLS; if empty, keys-file has the keys, and each "
        "gateway counts requests, tokens and answers for itself",
        env="NANOCHAT_REDIS_URL",
        secret=True,
    )
    redis_timeout_seconds: float = setting(
        1.0, "longest wait for Redis, in seconds", env="NANOCHAT_REDIS_TIMEOUT_SECONDS", minimum=0.01
    )
    keys_file: str = setting(
        "",
        "JSON file with the keys, for one gateway without Redis; may be replaced while the gateway runs; if keys-file "
        "and redis-url are empty, there are no keys, and the usage is lost when the gateway ends",
        env="NANOCHAT_KEYS_FILE",
    )

    def __post_init__(self) -> None:
        if self.redis_url and self.keys_file:
            raise ValueError("redis_url and keys_file are two places for the keys; give only one of them")


@dataclasses.dataclass(frozen=True)
class AdmissionSettings(KeyStoreSettings):
    """Settings that say what the callers of the gateway may do, and how much."""

    redis_failure: Literal["open", "closed"] = setting(
        "open",
        "behavior while Redis does not answer: with open, each gateway counts requests, tokens and answers for itself "
        "and accepts the keys that it knows; with closed, it answers 503 to callers with limits and, except for "
        "/metrics, to callers with a key",
    )
    anonymous_scopes: tuple[str, ...] = setting(
        ("chat", "sandbox", "metrics"),
        "scopes (permissions) of callers without a key, comma separated: chat, sandbox, metrics; the word none means "
        "that every caller needs a key",
    )
    requests_per_minute: int = setting(
        0,
        "limit on the requests per minute of each caller (a key, or the address of a client without a key) that has no "
        "limits of its own; 0 sets no limit",
        minimum=0,
        maximum=MAX_LIMIT,
    )
    tokens_per_minute: int = setting(
        0,
        "limit on the tokens of prompts and answers per minute of each caller that has no limits of its own; 0 sets no "
        "limit",
        minimum=0,
        maximum=MAX_LIMIT,
    )
    parallel_answers: int = setting(
        0,
        "limit on the simultaneously answered requests of each caller that has no limits of its own; a request counts "
        "once, however many choices (n) it has; 0 sets no limit",
        minimum=0,
        maximum=MAX_LIMIT,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        scopes = () if self.anonymous_scopes == ("none",) else self.anonymous_scopes
        wrong = set(scopes) - {"chat", "sandbox", "metrics"}
        if wrong:
            raise ValueError(
                f"anonymous_scopes has {sorted(wrong)[0]!r}; use chat, sandbox and metrics, or the word none"
            )
        object.__setattr__(self, "anonymous_scopes", scopes)


@dataclasses.dataclass(frozen=True)
class HttpsSettings:
    """Settings that name the files of the gateway's own certificate. Without a certificate, clients use plain HTTP."""

    https_certificate: str = setting(
        "", "PEM file with the certificate that clients see, and its chain; may be replaced while the gateway runs"
    )
    https_key: str = setting("", "PEM file with the private key of the certificate in https-certificate")

    def __post_init__(self) -> None:
        if bool(self.https_certificate) != bool(self.https_key):
            raise ValueError("https_certificate and https_key belong together; one of them is not set")


@dataclasses.dataclass(frozen=True)
class GatewaySettings(AdmissionSettings, HttpsSettings, TlsSettings, TracingSettings):
    """Serve an OpenAI-style REST API and the chat page in front of one or more inference engines."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "TCP port to listen on; 0 chooses a free port", minimum=0, maximum=65535)
    engine_addresses: tuple[str, ...] = setting(
        ("127.0.0.1:50051",),
        "host:port of the engines, comma separated; each address that a host name resolves to is one engine",
    )
    discovery_seconds: float = setting(
        LOOKUP_SECONDS, "seconds between two lookups of the engines' and sandboxes' names", minimum=0.05
    )
    sandbox_addresses: tuple[str, ...] = setting(
        (),
        "host:port of the sandboxes in which clients may run code (/v1/sandbox/execute), comma separated; each address "
        "that a host name resolves to is one sandbox; if empty, clients cannot run code",
    )
    lessons_home: str = setting(
        "",
        "artifact store for lessons (/v1/lessons): a folder or s3://bucket/prefix, in which the gateway uses only "
        "lessons/; if empty, the API accepts no lessons",
    )
    model_aliases: tuple[str, ...] = setting(
        (), "further names that requests may use for the served model, comma separated"
    )
    default_temperature: float = setting(
        0.6, "temperature of requests that set none; small models ramble at OpenAI's default of 1", minimum=0, maximum=2
    )
    default_max_tokens: int = setting(
        0,
        "maximum number of tokens of an answer if the request sets no limit; 0 allows the rest of the context",
        minimum=0,
    )
    max_choices: int = setting(8, "maximum number of answers to one prompt (n)", minimum=1)
    max_prompts: int = setting(256, "maximum number of prompts in one request for text completions", minimum=1)
    unknown_parameters: Literal["ignore", "refuse"] = setting(
        "ignore", "what to do with parameters that this server does not know; OpenAI's server refuses them"
    )
    max_body_bytes: int = setting(1_000_000, "largest accepted request body in bytes", minimum=1024)
    max_held_bytes: int = setting(
        2**27,
        "largest size of all request bodies in memory together, in bytes; a request beyond it gets 503",
        minimum=1024,
    )
    max_header_bytes: int = setting(
        16_384, "largest accepted size of a request's first line and headers together, in bytes", minimum=1024
    )
    max_connections: int = setting(
        4096,
        "maximum number of connections of clients; a further connection closes the one that has been idle longest",
        minimum=1,
    )
    arrival_seconds: float = setting(
        30.0,
        "maximum seconds from a request's first byte, or from the start of a connection, to the request's end",
        minimum=0.1,
    )
    stall_seconds: float = setting(
        60.0,
        "maximum seconds for a client to read the part of its answer that is ready to be sent, about 32 kB",
        minimum=0.1,
    )
    request_timeout_seconds: float = setting(
        600.0, "maximum seconds that engines, or a sandbox, may work on one request", minimum=1
    )
    heartbeat_seconds: float = setting(
        10.0,
        "seconds of silence after which a stream that an engine has accepted gets a comment line, so that proxies keep "
        "it open",
        minimum=0.05,
    )
    connect_timeout_seconds: float = setting(
        5.0, "maximum seconds to wait for a connection to an engine and for the description of its model", minimum=0.1
    )
    poll_seconds: float = setting(1.0, "seconds between two checks of an engine's health and load", minimum=0.05)
    health_timeout_seconds: float = setting(
        1.0,
        "maximum seconds for a check of health or load; two checks without an answer mean a hung engine",
        minimum=0.05,
    )
    model_poll_seconds: float = setting(
        5.0,
        "seconds after which the gateway reads the description of an engine's model again, even if the engine reports "
        "no new revision",
        minimum=0.05,
    )
    max_engine_sequences: int = setting(
        0,
        "maximum number of answers that this gateway runs at once in one engine; a request with more answers to a "
        "prompt runs alone; 0 leaves the limit to the engine",
        minimum=0,
    )
    queue_size: int = setting(
        1000,
        "maximum number of requests that wait for an engine, each prompt of a request counted; further requests get "
        "429; with 0, no request waits",
        minimum=0,
    )
    queue_seconds: float = setting(
        30.0, "maximum seconds that a request, or a stream that lost its engine, waits for an engine", minimum=0
    )
    max_failures: int = setting(
        4, "number of engine failures in a row, without a token in between, after which a request fails", minimum=1
    )
    waiting_hint: str = setting("", "sentence that the chat page adds to its message while no engine is ready")
    canary: str = setting(
        "",
        "<model>/<stage>/step_<n>: a revision that gets a share of the requests until it does worse than the model's "
        "other revisions",
    )
    canary_percent: float = setting(
        10.0, "percentage of the model's requests that go to the revision in canary", minimum=0, maximum=90
    )
    max_message_bytes: int = setting(
        64 * 1024 * 1024,
        "largest gRPC message from or to an engine, in bytes; one message carries the whole tokenizer",
        minimum=65536,
    )
    drain_seconds: float = setting(30.0, "maximum seconds for running answers to finish after SIGTERM", minimum=0)
    response_seconds: int = setting(
        3600, "maximum seconds for which a response of /v1/responses can be continued; 0 keeps no responses", minimum=0
    )
    static_dir: str = setting(str(Path(__file__).parent / "static"), "folder with the built web page")
    cors_origins: tuple[str, ...] = setting(
        (), "web origins whose pages may call the API, comma separated; * allows all, empty allows none"
    )
    trace_ratio: float = setting(
        1.0,
        "share of the requests whose trace is exported; for a request that brings its own trace, the caller decides",
        minimum=0,
        maximum=1,
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe event that is logged")

    def __post_init__(self) -> None:
        AdmissionSettings.__post_init__(self)
        HttpsSettings.__post_init__(self)
        if self.canary and self.canary.count("/") != 2:
            raise ValueError(f"canary is {self.canary!r}; give <model>/<stage>/step_<n>")
        if not self.engine_addresses:
            raise ValueError("engine_addresses names no engine; give at least one host:port")
        for address in (*self.engine_addresses, *self.sandbox_addresses):
            split_target(address)
        if len(set(self.engine_addresses)) != len(self.engine_addresses):
            raise ValueError("engine_addresses names an engine twice; each replica needs an address of its own")
