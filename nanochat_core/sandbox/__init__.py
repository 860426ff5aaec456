"""Runs untrusted Python. Each call gets its own process, which can only compute, print and use a scratch folder.

The package needs only the standard library, so training, evaluation and the service can all use it.
"""

from nanochat_core.sandbox.config import SandboxConfig
from nanochat_core.sandbox.errors import SandboxUnavailable, WorkerFailed
from nanochat_core.sandbox.executor import ExecutorStats, SandboxExecutor
from nanochat_core.sandbox.results import ExecutionResult, Limits, ResultFormat, Status, Usage

__all__ = [
    "ExecutionResult",
    "ExecutorStats",
    "Limits",
    "ResultFormat",
    "SandboxConfig",
    "SandboxExecutor",
    "SandboxUnavailable",
    "Status",
    "Usage",
    "WorkerFailed",
]
