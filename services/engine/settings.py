"""Settings of the engine service."""

import dataclasses
from typing import Literal

from nanochat_core.discovery import split_target
from nanochat_core.engine import EngineConfig
from nanochat_core.engine.config import EngineOptions
from nanochat_core.grpc_service import ListenSettings
from nanochat_core.settings import setting
from nanochat_core.store import DEFAULT_HOME


@dataclasses.dataclass(frozen=True)
class EngineSettings(EngineOptions, ListenSettings):
    """Serve one model of the artifact store over gRPC: continue sequences of tokens."""

    port: int = setting(50051, "port to serve gRPC on; 0 chooses a free port", minimum=0, maximum=65535)
    metrics_port: int = setting(
        9091, "port to serve Prometheus metrics on; 0 chooses a free port", minimum=0, maximum=65535
    )
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    cache_dir: str = setting("", "folder for cached files of a remote store; empty means a temporary folder")
    cache_gib: float = setting(
        20.0, "size in GiB above which the least recently used files of the cache are deleted", minimum=0.0
    )
    model: str = setting("demo", "name of the model in the store")
    revision: str = setting("", "revision to serve, as <stage>/step_<n>; empty follows promotions")
    snapshots: bool = setting(
        False, "until a revision is first promoted, always serve the newest checkpoint of RL or else of fine-tuning"
    )
    poll_seconds: float = setting(5.0, "seconds between two checks for a new promotion", minimum=0.1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device that computes")
    dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "dtype of weights and KV cache; auto is bf16 on GPUs that support it and otherwise fp32"
    )
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0, maximum=4096)
    sandbox_address: tuple[str, ...] = setting(
        (),
        "host:port of the sandboxes, comma separated; each address that a host name resolves to is one sandbox; if "
        "empty, the model's Python calls return an error message",
    )
    kv_cache_mib: int = setting(0, "size of the KV cache in MiB; 0 derives it from memory and max-running", minimum=0)
    retire_seconds: float = setting(
        600.0, "seconds that running answers get to finish after another model has replaced their model", minimum=0.1
    )
    hang_seconds: float = setting(
        300.0, "seconds after which a step counts as hung and the process ends; 0 sets no limit", minimum=0.0
    )
    drain_seconds: float = setting(
        25.0, "seconds that running answers get to finish when the service ends", minimum=0.0
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "lowest level of the log events that are written"
    )

    def __post_init__(self) -> None:
        for target in self.sandbox_address:
            split_target(target)

    def engine_config(self) -> EngineConfig:
        """Return the settings that concern the inference core."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)}
        return EngineConfig(**shared, kv_cache_bytes=self.kv_cache_mib << 20 or None)
