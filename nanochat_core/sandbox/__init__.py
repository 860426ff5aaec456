"""Runs untrusted Python. Each call gets its own process. The process can only compute, print and use a scratch folder.

The package needs only the standard library, so training, evaluation and the service can all use it.
"""

from nanochat_core.sandbox.capture import OnData
from nanochat_core.sandbox.executor import ExecutorStats, SandboxExecutor
from nanochat_core.sandbox.interface import (
    CodeNotBegun,
    ExecutionResult,
    Inputs,
    Limits,
    ResultFormat,
    SandboxConfig,
    SandboxUnavailable,
    Status,
    Usage,
    WorkerFailed,
)
