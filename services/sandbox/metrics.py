"""Prometheus metrics of the sandbox service."""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from nanochat_core.sandbox import ExecutionResult, SandboxExecutor, Status

_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """All metrics of a sandbox service, in a Prometheus registry of their own."""

    def __init__(self, executor: SandboxExecutor) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = functools.partial(Counter, registry=self.registry)
        gauge = functools.partial(Gauge, registry=self.registry)
        self._executions = counter("nanochat_sandbox_executions_total", "Finished calls by status", ("status",))
        for status in Status:
            self._executions.labels(status.value)
        self._seconds = Histogram(
            "nanochat_sandbox_execution_seconds",
            "Time from a call's arrival to its answer, including the wait for a slot",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._queue_seconds = Histogram(
            "nanochat_sandbox_queue_seconds",
            "Time that a call waited for its turn and for a process",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.failures = counter("nanochat_sandbox_failures_total", "Calls that failed because of the sandbox itself")
        gauge("nanochat_sandbox_running", "Calls that run now").set_function(lambda: executor.stats.running)
        gauge("nanochat_sandbox_queued", "Calls that wait for a slot").set_function(lambda: executor.stats.queued)
        warm = gauge("nanochat_sandbox_warm_interpreters", "Idle workers that wait for a call")
        warm.set_function(lambda: executor.stats.warm)
        gauge("nanochat_sandbox_concurrency", "Calls that may run at once").set(executor.config.concurrency)
        profile = Info("nanochat_sandbox_profile", "The active isolation profile", registry=self.registry)
        profile.info({"profile": executor.profile, "landlock_abi": str(executor.landlock_abi)})

    def observe(self, result: ExecutionResult, seconds: float) -> None:
        """Count a finished call that took ``seconds``."""
        self._executions.labels(result.status.value).inc()
        self._seconds.observe(seconds)
        self._queue_seconds.observe(result.queue_seconds)
