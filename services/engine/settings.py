"""Settings of the engine service."""

from __future__ import annotations

import dataclasses
from typing import Literal

from nanochat_core.engine import EngineConfig
from nanochat_core.settings import setting
from nanochat_core.store import DEFAULT_HOME


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """gRPC service that continues token sequences with one model of the artifact store."""

    host: str = setting("127.0.0.1", "address to serve gRPC on")
    port: int = setting(50051, "port to serve gRPC on; 0 takes any free one", minimum=0, maximum=65535)
    metrics_host: str = setting("", "address to serve Prometheus metrics on; empty means the same as the host")
    metrics_port: int = setting(9091, "port of the metrics; 0 takes any free one", minimum=0, maximum=65535)
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    cache_dir: str = setting("", "folder for files of a remote store; empty means a temporary one")
    cache_gib: float = setting(
        20.0,
        "size in GiB above which the least recently used files of the cache are deleted",
        minimum=0.0,
    )
    model: str = setting("demo", "name of the model in the store")
    revision: str = setting("", "<stage>/step_<n> to serve; empty follows the promoted revision")
    poll_seconds: float = setting(5.0, "seconds between checks of the promoted revision", minimum=0.1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device to compute on")
    dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "dtype of weights and cache; auto is fp32 on CPUs and bf16 on GPUs that compute in it"
    )
    quantization: Literal["none", "int8"] = setting(
        EngineConfig.quantization,
        "int8 rounds the matrices to eight bits on CPUs; faster for few answers at a time",
    )
    kernels: bool = setting(EngineConfig.kernels, "compute with the engine's own kernels if they are available")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0)
    sandbox_address: str = setting("", "host:port of the sandbox; without one the model's calls get an error to read")
    block_size: int = setting(EngineConfig.block_size, "tokens per block of the KV cache", minimum=1)
    kv_cache_mib: int = setting(0, "size of the KV cache in MiB; 0 derives it from memory and max-running", minimum=0)
    token_budget: int = setting(EngineConfig.token_budget, "most tokens computed in one step", minimum=1)
    max_running: int = setting(EngineConfig.max_running, "most sequences running at once", minimum=1)
    max_waiting: int = setting(EngineConfig.max_waiting, "most sequences queued; further ones are refused", minimum=0)
    speculative_tokens: int = setting(
        EngineConfig.speculative_tokens,
        "longest draft of tokens looked up in the sequence itself; 0 drafts nothing",
        minimum=0,
    )
    speculative_batch: int = setting(
        EngineConfig.speculative_batch,
        "drafts are made while one token and one draft of every running sequence are at most this many tokens",
        minimum=0,
    )
    tool_timeout_seconds: float = setting(
        EngineConfig.tool_timeout_seconds, "seconds after which a Python call is given up", minimum=0.01
    )
    tool_max_calls: int = setting(EngineConfig.tool_max_calls, "python calls per answer", minimum=1)
    tool_max_output_tokens: int = setting(
        EngineConfig.tool_max_output_tokens, "tokens of output that the model reads per call", minimum=1
    )
    retire_seconds: float = setting(
        600.0, "seconds that running answers get to finish when another model takes over", minimum=0.1
    )
    hang_seconds: float = setting(
        300.0,
        "seconds of one step after which the device counts as hung and the process ends; 0 waits forever",
        minimum=0.0,
    )
    drain_seconds: float = setting(25.0, "seconds that running answers get to finish at the end", minimum=0.0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")

    def engine_config(self) -> EngineConfig:
        """The part that concerns the inference core."""
        return EngineConfig(
            block_size=self.block_size,
            kv_cache_bytes=self.kv_cache_mib << 20 or None,
            token_budget=self.token_budget,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            speculative_tokens=self.speculative_tokens,
            speculative_batch=self.speculative_batch,
            kernels=self.kernels,
            quantization=self.quantization,
            tool_timeout_seconds=self.tool_timeout_seconds,
            tool_max_calls=self.tool_max_calls,
            tool_max_output_tokens=self.tool_max_output_tokens,
        )
