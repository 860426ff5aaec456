"""Runs untrusted Python. Each call has a process of its own that can only compute, print and use a scratch folder.

The package needs only the standard library, so training, evaluation and the service can share one isolation.
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
