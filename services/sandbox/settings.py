"""Settings of the sandbox service."""

import dataclasses
import tempfile
from typing import Literal

from nanochat_core.grpc_service import ListenSettings
from nanochat_core.sandbox import Limits, SandboxConfig
from nanochat_core.sandbox.config import DEFAULT_LIMITS, MAXIMUM_LIMITS
from nanochat_core.settings import setting


@dataclasses.dataclass(frozen=True)
class SandboxSettings(ListenSettings):
    """gRPC service that runs Python code in isolation."""

    port: int = setting(50052, "port to serve gRPC on; 0 takes any free one", minimum=0, maximum=65535)
    metrics_port: int = setting(
        9092, "port to serve Prometheus metrics on; 0 takes any free one", minimum=0, maximum=65535
    )
    profile: Literal["auto", "bwrap", "pod"] = setting(
        "auto", "isolation profile; auto takes the strongest profile that passes its self-test"
    )
    interpreter: str = setting("", "path of the Python that runs the code; empty means the service's own Python")
    scratch_dir: str = setting(
        tempfile.gettempdir(), "writable folder for scratch folders (profile pod); a tmpfs of limited size is best"
    )
    scratch_bytes: int = setting(
        SandboxConfig.scratch_bytes, "bytes that a call may store in its scratch folder", minimum=4096
    )
    scratch_files: int = setting(SandboxConfig.scratch_files, "files that a call may store (profile pod)", minimum=1)
    concurrency: int = setting(SandboxConfig.concurrency, "largest number of calls that run at once", minimum=1)
    queue: int = setting(
        SandboxConfig.queue, "calls that may wait for a slot; further calls are answered OVERLOADED", minimum=0
    )
    warm: int = setting(SandboxConfig.warm, "idle interpreters that are kept ready for the next calls", minimum=0)
    preload: tuple[str, ...] = setting(
        SandboxConfig.preload, "standard-library modules that are imported before the code arrives, separated by commas"
    )
    wall_seconds: float = setting(
        DEFAULT_LIMITS.wall_seconds, "default limit of a call's time in seconds", minimum=0.01
    )
    cpu_seconds: float = setting(
        DEFAULT_LIMITS.cpu_seconds, "default limit of a call's CPU time in seconds", minimum=0.01
    )
    memory_bytes: int = setting(
        DEFAULT_LIMITS.memory_bytes, "default limit of a call's memory in bytes", minimum=1 << 20
    )
    output_bytes: int = setting(
        DEFAULT_LIMITS.output_bytes, "default limit of stdout, of stderr and of the result in bytes", minimum=1
    )
    max_wall_seconds: float = setting(
        MAXIMUM_LIMITS.wall_seconds, "largest time limit that a call can ask for, in seconds", minimum=0.01
    )
    max_cpu_seconds: float = setting(MAXIMUM_LIMITS.cpu_seconds, "largest limit of CPU time, in seconds", minimum=0.01)
    max_memory_bytes: int = setting(MAXIMUM_LIMITS.memory_bytes, "largest limit of memory, in bytes", minimum=1 << 20)
    max_output_bytes: int = setting(MAXIMUM_LIMITS.output_bytes, "largest limit of each output, in bytes", minimum=1)
    max_code_bytes: int = setting(1 << 20, "largest size of the code in bytes of UTF-8", minimum=1)
    drain_seconds: float = setting(10.0, "seconds that running calls get to finish when the service ends", minimum=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "lowest level of the log events that are written"
    )

    def __post_init__(self) -> None:
        self.executor_config()

    def executor_config(self) -> SandboxConfig:
        """The settings of the executor: every field of SandboxConfig that is also a setting here, and the limits."""
        names = {field.name for field in dataclasses.fields(SandboxConfig)}
        shared = {name: value for name, value in vars(self).items() if name in names}
        return SandboxConfig(
            **shared,
            default_limits=Limits(self.wall_seconds, self.cpu_seconds, self.memory_bytes, self.output_bytes),
            maximum_limits=Limits(
                self.max_wall_seconds, self.max_cpu_seconds, self.max_memory_bytes, self.max_output_bytes
            ),
        )
