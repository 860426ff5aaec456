"""Settings of the sandbox service."""

import dataclasses
from typing import Literal

from nanochat_core.grpc_service import ListenSettings
from nanochat_core.sandbox import SandboxConfig
from nanochat_core.settings import setting


@dataclasses.dataclass(frozen=True)
class SandboxSettings(SandboxConfig, ListenSettings):
    """Serve the sandbox over gRPC: run Python code in isolation."""

    port: int = setting(50052, "port to serve gRPC on; 0 chooses a free port", minimum=0, maximum=65535)
    metrics_port: int = setting(
        9092, "port to serve Prometheus metrics on; 0 chooses a free port", minimum=0, maximum=65535
    )
    max_code_bytes: int = setting(1 << 20, "largest size of a call's code, in bytes of UTF-8", minimum=1)
    drain_seconds: float = setting(10.0, "seconds that running calls get to finish when the service ends", minimum=0)
    probe_seconds: float = setting(
        5.0,
        "seconds between two test calls of the sandbox; while they fail, its health service reports NOT_SERVING",
        minimum=0.1,
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "lowest level of the log events that are written"
    )
