"""The gateway's Prometheus metrics."""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_REQUEST_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """All metrics of one gateway, in a Prometheus registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = functools.partial(Counter, registry=self.registry)
        gauge = functools.partial(Gauge, registry=self.registry)
        histogram = functools.partial(Histogram, registry=self.registry)
        self.requests = counter(
            "nanochat_gateway_requests_total",
            "HTTP requests; status 499 means that the client left before the end",
            ("route", "status"),
        )
        self.request_seconds = histogram(
            "nanochat_gateway_request_duration_seconds",
            "Time from a request's arrival to the end of its answer",
            ("route",),
            buckets=_REQUEST_SECONDS,
        )
        self.connections_closed = counter(
            "nanochat_gateway_connections_closed_total",
            "Connections that the gateway closed: no request came (silent, idle) or only a part of one (late), the "
            "client did not read its answer (stalled), there were too many (crowded), or the request was malformed or "
            "oversized",
            ("reason",),
        )
        self.held_bytes = gauge("nanochat_gateway_held_bytes", "Received body bytes of all requests in progress")
        self.in_flight = gauge("nanochat_gateway_requests_in_flight", "HTTP requests being answered")
        self.first_token_seconds = histogram(
            "nanochat_gateway_time_to_first_token_seconds",
            "Time from a request's arrival to its first token from an engine",
            buckets=_FIRST_TOKEN_SECONDS,
        )
        self.inter_token_seconds = histogram(
            "nanochat_gateway_inter_token_latency_seconds",
            "Time between two tokens of a choice as they come from an engine",
            buckets=_INTER_TOKEN_SECONDS,
        )
        self.prompt_tokens = counter("nanochat_gateway_prompt_tokens_total", "Tokens of prompts sent to engines")
        self.cached_prompt_tokens = counter(
            "nanochat_gateway_cached_prompt_tokens_total", "Tokens of prompts that engines had in their prefix caches"
        )
        self.generation_tokens = counter(
            "nanochat_gateway_generation_tokens_total", "Tokens of answers received from engines, tool output included"
        )
        self.finished = counter(
            "nanochat_gateway_choices_finished_total", "Choices by the reason for their end", ("finish_reason",)
        )
        self.failovers = counter(
            "nanochat_gateway_failovers_total",
            "Requests that another engine began to answer because the first engine could not",
        )
        self.migrations = counter(
            "nanochat_gateway_migrations_total",
            "Running answers that another engine continued, by the reason for leaving the first engine",
            ("reason",),
        )
        for reason in ("died", "hung", "drains"):
            # The counters of the usual reasons begin at 0, so that Prometheus sees them before the first migration.
            self.migrations.labels(reason)
        self.migration_gap_seconds = histogram(
            "nanochat_gateway_migration_gap_seconds",
            "Time between the last part of an answer from the old engine and the first part from the new engine",
            ("reason",),
            buckets=_FIRST_TOKEN_SECONDS,
        )
        self.streams_lost = counter(
            "nanochat_gateway_streams_lost_total",
            "Running answers that ended with an error because no engine continued them",
        )
        self.ejections = counter(
            "nanochat_gateway_engine_ejections_total",
            "Times that an engine got no calls for a while because calls to it had failed",
        )
        self.queue_length = gauge("nanochat_gateway_queue_length", "Requests that wait for an engine")
        self.queue_seconds = histogram(
            "nanochat_gateway_queue_wait_seconds",
            "Time that requests waited for an engine with room",
            buckets=_FIRST_TOKEN_SECONDS,
        )
        self.queue_refusals = counter(
            "nanochat_gateway_queue_refusals_total",
            "Requests that got no engine: the queue was full, or they waited too long (late)",
            ("reason",),
        )
        self.canary_percent = gauge("nanochat_gateway_canary_percent", "Share of the requests that the canary gets")
        self.canary_returned = gauge(
            "nanochat_gateway_canary_returned",
            "1 once the canary has lost its share because it did worse than the other revisions",
        )
        self.engine_up = gauge(
            "nanochat_gateway_engine_up", "1 while an engine is healthy and its model is known", ("address",)
        )
        self.admission_refusals = counter(
            "nanochat_gateway_admission_refusals_total",
            "Requests that were refused for their key, its scopes or a limit, by the code of the error",
            ("code",),
        )
        self.key_requests = counter(
            "nanochat_gateway_key_requests_total",
            "Accepted requests to the model, its tokenizer or the sandbox, by the id of their API key",
            ("key",),
        )
        self.key_tokens = counter(
            "nanochat_gateway_key_tokens_total",
            "Tokens by the id of the API key, and by their kind: prompt or completion",
            ("key", "kind"),
        )
        self.redis_up = gauge(
            "nanochat_gateway_redis_up", "1 while Redis answers; 0 while it does not, or if no Redis is configured"
        )
