"""Settings of the sandbox service."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Literal

from nanochat_core.sandbox import Limits, SandboxConfig
from nanochat_core.sandbox.config import DEFAULT_LIMITS, MAXIMUM_LIMITS
from nanochat_core.settings import setting


@dataclasses.dataclass(frozen=True)
class SandboxSettings:
    """gRPC service that runs Python code in isolation."""

    host: str = setting("127.0.0.1", "address to serve gRPC on")
    port: int = setting(50052, "port to serve gRPC on; 0 takes any free one", minimum=0, maximum=65535)
    metrics_host: str = setting("", "address to serve Prometheus metrics on; empty means the same as the host")
    metrics_port: int = setting(9092, "port of the metrics; 0 takes any free one", minimum=0, maximum=65535)
    profile: Literal["auto", "bwrap", "pod"] = setting(
        "auto", "isolation profile; auto takes the strongest one whose self-test passes"
    )
    interpreter: str = setting("", "python that runs the code; empty means the one that runs the service")
    scratch_dir: str = setting(
        tempfile.gettempdir(), "writable folder for the calls' scratch folders (profile pod); best a sized tmpfs"
    )
    scratch_bytes: int = setting(
        SandboxConfig.scratch_bytes, "bytes that one call may store in its scratch folder", minimum=4096
    )
    scratch_files: int = setting(SandboxConfig.scratch_files, "files that one call may store (profile pod)", minimum=1)
    concurrency: int = setting(SandboxConfig.concurrency, "calls that run at once", minimum=1)
    queue: int = setting(
        SandboxConfig.queue, "calls that may wait for a slot; one more is answered OVERLOADED", minimum=0
    )
    warm: int = setting(
        SandboxConfig.warm, "interpreters kept started and isolated, one for each call to come", minimum=0
    )
    preload: tuple[str, ...] = setting(
        SandboxConfig.preload, "standard-library modules imported before the code arrives, comma separated"
    )
    wall_seconds: float = setting(DEFAULT_LIMITS.wall_seconds, "time that a call gets by default", minimum=0.01)
    cpu_seconds: float = setting(DEFAULT_LIMITS.cpu_seconds, "CPU seconds by default", minimum=0.01)
    memory_bytes: int = setting(DEFAULT_LIMITS.memory_bytes, "bytes of memory by default", minimum=1 << 20)
    output_bytes: int = setting(
        DEFAULT_LIMITS.output_bytes, "bytes of stdout, stderr and result each, by default", minimum=1
    )
    max_wall_seconds: float = setting(MAXIMUM_LIMITS.wall_seconds, "most time that a call can ask for", minimum=0.01)
    max_cpu_seconds: float = setting(MAXIMUM_LIMITS.cpu_seconds, "most CPU seconds", minimum=0.01)
    max_memory_bytes: int = setting(MAXIMUM_LIMITS.memory_bytes, "most bytes of memory", minimum=1 << 20)
    max_output_bytes: int = setting(MAXIMUM_LIMITS.output_bytes, "most bytes of each output", minimum=1)
    max_code_bytes: int = setting(1 << 20, "longest code in bytes of UTF-8", minimum=1)
    drain_seconds: float = setting(10.0, "time that running calls get when the service ends", minimum=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")

    def __post_init__(self) -> None:
        self.executor_config()

    def executor_config(self) -> SandboxConfig:
        """The executor's part. Raises ValueError when a default limit is above its maximum."""
        return SandboxConfig(
            profile=self.profile,
            interpreter=self.interpreter,
            scratch_dir=self.scratch_dir,
            concurrency=self.concurrency,
            queue=self.queue,
            warm=self.warm,
            default_limits=Limits(self.wall_seconds, self.cpu_seconds, self.memory_bytes, self.output_bytes),
            maximum_limits=Limits(
                self.max_wall_seconds, self.max_cpu_seconds, self.max_memory_bytes, self.max_output_bytes
            ),
            scratch_bytes=self.scratch_bytes,
            scratch_files=self.scratch_files,
            preload=self.preload,
        )
