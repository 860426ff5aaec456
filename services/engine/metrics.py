"""Prometheus metrics of the engine service."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from nanochat_core.engine import Load, Observer

# Upper bounds of the histograms' buckets, in seconds.
_LATENCY = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_STEP = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Metrics(Observer):
    """All metrics of an engine service, in a registry of their own. The engine reports its events to this object."""

    def __init__(self, load: Callable[[], Load], sandboxes: Callable[[], int] | None = None) -> None:
        """``load`` returns the current load, summed over the engines of all models in memory.

        ``sandboxes`` returns the number of sandboxes that accept calls; None if the engine uses no sandbox.
        """
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._gauge("requests_running", "Sequences in the batch", lambda: load().running)
        self._gauge("requests_waiting", "Sequences in the queue", lambda: load().waiting)
        self._gauge("requests_parked", "Sequences that wait for a Python call", lambda: load().parked)
        self._gauge("kv_cache_usage_ratio", "Share of the KV cache's blocks in use", lambda: _cache_usage(load()))
        self._gauge("waiting_tokens", "Tokens that must be computed before sampling", lambda: load().waiting_tokens)
        self._continued = self._counter("requests_continued", "Requests that continue another engine's answer")
        if sandboxes is not None:  # without the metric, there is no alert about an engine that needs no sandbox
            self._gauge("sandboxes", "Sandboxes that accept Python calls", sandboxes)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of admitted requests")
        self._generated = self._counter("generation_tokens", "Sampled tokens")
        self._preemptions = self._counter("preemptions", "Sequences that lost their blocks and are computed again")
        self._out_of_memory = self._counter("out_of_memory", "Steps that did not fit into the device's memory")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._drafted = self._counter("draft_tokens", "Tokens drafted by lookup in their own sequence")
        self._accepted = self._counter("draft_tokens_accepted", "Drafted tokens that the model confirmed")
        self._finished = self._counter("requests_finished", "Finished choices by reason", "reason")
        self._refused = self._counter("requests_refused", "Refused requests by reason", "reason")
        self._tools = self._counter("tool_calls", "Python calls by status", "status")
        self._tool_retries = self._counter("tool_retries", "Python calls that were repeated at another sandbox")
        self._queued = self._histogram(
            "queue_time_seconds", "Time from arrival to the start of the computation", _LATENCY
        )
        self._first = self._histogram("time_to_first_token_seconds", "Time from arrival to the first token", _LATENCY)
        self._next = self._histogram("inter_token_latency_seconds", "Time between two tokens of a choice", _STEP)
        self._duration = self._histogram(
            "request_duration_seconds", "Time from arrival to the end of a choice", _LATENCY
        )
        self._step = self._histogram("step_seconds", "Duration of one batch", _STEP)
        self._model = Info("nanochat_engine_model", "The model being served", registry=self.registry)

    def model(self, name: str, revision: str, dtype: str) -> None:
        """Publish the description of the model that begins to serve."""
        self._model.info({"name": name, "revision": revision, "dtype": dtype})

    def refused(self, reason: str) -> None:
        """Count a refused request."""
        self._refused.labels(reason).inc()

    def continued(self) -> None:
        """Count a request that continues an answer from another engine."""
        self._continued.inc()

    def admitted(self, queued: float, prompt_tokens: int, cached_tokens: int) -> None:
        self._queued.observe(queued)
        self._prompt.inc(prompt_tokens)
        self._prefix_queries.inc(prompt_tokens)
        self._prefix_hits.inc(cached_tokens)

    def preempted(self, sequences: int) -> None:
        self._preemptions.inc(sequences)

    def out_of_memory(self) -> None:
        self._out_of_memory.inc()

    def first_token(self, since_arrival: float) -> None:
        self._first.observe(since_arrival)

    def next_token(self, since_last: float) -> None:
        self._next.observe(since_last)

    def tool_called(self, status: str) -> None:
        self._tools.labels(status).inc()

    def tool_retried(self) -> None:
        """Count a Python call that is repeated at another sandbox."""
        self._tool_retries.inc()

    def finished(self, reason: str, since_arrival: float) -> None:
        self._finished.labels(reason).inc()
        self._duration.observe(since_arrival)

    def speculated(self, drafted: int, accepted: int) -> None:
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)

    def stepped(self, duration: float, generated_tokens: int) -> None:
        self._step.observe(duration)
        self._generated.inc(generated_tokens)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"nanochat_engine_{name}_total", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"nanochat_engine_{name}", text, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"nanochat_engine_{name}", text, registry=self.registry).set_function(value)


def _cache_usage(load: Load) -> float:
    return load.blocks_used / max(load.blocks_total, 1)
