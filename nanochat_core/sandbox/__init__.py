"""Runs untrusted Python. Each call gets its own process. The process can only compute, print and use a scratch folder.

The *executor* accepts calls, limits how many calls run at once, and lets a limited number of further calls wait for a
free *slot*. It starts a *fork server*: a Python process that has already imported the modules that code usually needs.
For each call, the fork server forks a *worker*, which gives up its rights, runs the code of the call, and is then
killed. The isolation *profile* determines which features of the kernel isolate the workers. The *scratch folder* of a
call is the only folder in which its code can write files.

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
