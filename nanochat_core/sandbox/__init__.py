"""Runs untrusted Python, each call in a process of its own that can compute, print and use a scratch folder, no more.

Standard library only, so that training jobs, evaluation and the service share the same isolation.
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
